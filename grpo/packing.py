"""How a global batch is cut into micro-batches, for one rank or several.

Each token's loss weight is divided by the denominator of the whole global batch before packing, so the gradient does
not depend on how samples fall into micro-batches.

    micro_batches = pack(samples, token_budget=8192, aggregation="token")
"""

from collections.abc import Iterator, Sequence

from grpo.batch import Aggregation, BatchTotals, MicroBatch, TrainingSample, build_micro_batch


def pack(
    samples: Sequence[TrainingSample],
    token_budget: int,
    aggregation: Aggregation,
    constant_length: int = 0,
    totals: BatchTotals | None = None,
) -> list[MicroBatch]:
    """Splits a global batch into micro-batches of at most `token_budget` tokens.

    `constant_length` is what aggregation "constant" divides by. `totals` are those of the global batch where `samples`
    are a part of it. Samples are laid out longest first, so that a micro-batch holds samples of similar length. Raises
    ValueError if one sample alone exceeds the budget, or if nothing is to be trained.
    """
    return pack_for_ranks(
        samples, token_budget, aggregation, constant_length, totals, num_ranks=1, quadratic_at=1
    )[0]  # fmt: skip


def pack_for_ranks(
    samples: Sequence[TrainingSample],
    token_budget: int,
    aggregation: Aggregation,
    constant_length: int = 0,
    totals: BatchTotals | None = None,
    *,
    num_ranks: int,
    quadratic_at: int,
    share_prompts: bool = False,
) -> list[list[MicroBatch]]:
    """The same for several ranks, which work in step: equally many micro-batches for each, their n-th of similar cost.

    A sample of L tokens costs L (1 + L / quadratic_at): at that length attention costs as much as all the rest. Loss
    weights come from the whole batch. Where samples are too few, a rank gets micro-batches without trained tokens.
    With `share_prompts`, samples of one prompt come one after the other, and those in one micro-batch have their prompt
    computed once; `token_budget` counts whole samples all the same.
    """
    totals = totals or BatchTotals.of(samples)
    places = [place for place, sample in enumerate(samples) if sample.num_trained]
    if not places:
        raise ValueError("no sample has a token to train")
    lengths = {place: len(samples[place].token_ids) for place in places}
    if max(lengths.values()) > token_budget:
        raise ValueError(
            f"a sample of {max(lengths.values())} tokens exceeds token_budget={token_budget}; raise the budget"
        )
    weights = {place: _token_weight(samples[place], aggregation, constant_length, totals) for place in places}
    weight_sum = totals.tokens / (totals.samples * constant_length) if aggregation == "constant" else 1.0
    nothing = TrainingSample(token_ids=[0], loss_mask=[False], sampling_logprobs=[0.0])
    idle = build_micro_batch([nothing], [0.0], [0], weight_sum, totals, share_prompts=False)
    batches: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    order = _by_prompt(samples, lengths) if share_prompts else sorted(lengths, key=lambda place: -lengths[place])
    for of_round in _rounds({place: lengths[place] for place in order}, token_budget, num_ranks, quadratic_at):
        for rank, group in enumerate(of_round):
            mine = [samples[i] for i in group], [weights[i] for i in group], group
            batch = build_micro_batch(*mine, weight_sum, totals, share_prompts=share_prompts) if group else idle
            batches[rank].append(batch)
    return batches


def _by_prompt(samples: Sequence[TrainingSample], lengths: dict[int, int]) -> list[int]:
    """Prompts by their longest sample, each prompt's samples together: those with recorded experts, then by length."""
    prompts = {place: samples[place].prompt_ids for place in lengths}
    longest: dict[tuple[int, ...], tuple[int, int]] = {}
    for place in sorted(lengths, key=lambda place: -lengths[place]):
        longest.setdefault(prompts[place], (-lengths[place], place))
    return sorted(
        lengths, key=lambda place: (longest[prompts[place]], samples[place].expert_ids is None, -lengths[place])
    )


def _rounds(lengths: dict[int, int], token_budget: int, num_ranks: int, quadratic_at: int) -> Iterator[list[list[int]]]:
    """The places of each rank's next micro-batch: the next sample goes to the rank with the least to do, until one does
    not fit there."""
    groups: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens, costs = [0] * num_ranks, [0.0] * num_ranks
    for place in lengths:
        length, rank = lengths[place], min(range(num_ranks), key=costs.__getitem__)
        if tokens[rank] + length > token_budget:
            yield groups
            groups, rank = [[] for _ in range(num_ranks)], 0
            tokens, costs = [0] * num_ranks, [0.0] * num_ranks
        groups[rank].append(place)
        tokens[rank] += length
        costs[rank] += length * (1 + length / quadratic_at)
    yield groups


def _token_weight(sample: TrainingSample, aggregation: Aggregation, constant_length: int, totals: BatchTotals) -> float:
    """The weight of each trained token of a sample."""
    if aggregation == "token":
        return 1 / totals.tokens
    assert aggregation == "sequence" or constant_length > 0, f"constant_length={constant_length} divides nothing"
    return 1 / (totals.samples * (sample.num_trained if aggregation == "sequence" else constant_length))
