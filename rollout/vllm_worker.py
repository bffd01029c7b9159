"""What vLLM's workers load of ours before anything else: named as `worker_extension_cls`, in this process or, for a
model that lies over several GPUs, in one process for each.
"""

from rollout.vllm_weight_transfer import register_backend

register_backend()


class WorkerExtension:
    """vLLM makes it a base of its worker; importing it is what counts."""
