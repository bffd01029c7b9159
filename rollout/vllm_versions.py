"""What differs between the versions of vLLM that are served, 0.25.1 to 0.33, in one table; only what the code asks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Since:
    """The first version that has something."""

    version: tuple[int, int]
    otherwise: str
    """What is so before it, and what the engine does then."""


TABLE = {
    "cpu_mla": Since((0, 28), "MLA on CPU raises NotImplementedError; VLLM_MLA_DISABLE=1 computes it as plain heads"),
    "records_in_v2": Since(
        (0, 31),
        "experts are recorded by the V1 model runner alone, whose draws are ours too: it is chosen for all models",
    ),
    "weight_version": Since((0, 27), "finish_weight_update takes no version; ours alone is recorded"),
}


def has(feature: str, version: str) -> bool:
    """Whether that vLLM, by its `__version__`, has a feature of the table."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= TABLE[feature].version
