"""Members over processes, with the processes played one after the other: their parts sum to the gradient."""

import pytest
import torch

from tests.llm.conftest import LORA, spread_members, tiny_base, tiny_batch
from vifamily.errors import ConfigError

peft = pytest.importorskip("peft")

from vifamily.llm._batches import Inputs  # noqa: E402
from vifamily.llm._passes import stacked_pass  # noqa: E402
from vifamily.llm._ranks import own_members, ranks_pass, whole_batch  # noqa: E402
from vifamily.llm._routed import supervised_loss  # noqa: E402
from vifamily.llm._stacked import StackedCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_parts_of_members_sum_to_the_gradient():
    members = 3
    model = StackedCausalLM(tiny_base(), peft.LoraConfig(**LORA, target_modules="all-linear"), members)
    spread_members(model)
    rows = tiny_batch()
    blocks = list(torch.arange(len(rows)).split(2))

    def score(part, chosen):
        return model(part.input_ids, part.attention_mask, part.completion_mask, chosen)

    def loss_of(value, index):
        part = rows.take(index)
        return supervised_loss(value, part.token_row, torch.arange(len(index)), "sequence", 0.7, model.log_weight)[0]

    whole = stacked_pass(score, rows, blocks, loss_of, torch.Tensor.backward)
    expected = [p.grad.clone() for p in model.adapter_parameters()]
    model.zero_grad()
    for rank in range(2):
        own = own_members(members, rank, 2)
        others = iter(blocks)

        def total(value, own=own, others=others):
            # what the other process would add
            with torch.no_grad():
                every = score(rows.take(next(others)), None)
            every[own[0] : own[1]] = 0.0
            return value + every

        found = ranks_pass(score, rows, blocks, loss_of, torch.Tensor.backward, own, members, total)
        assert float(found) == pytest.approx(float(whole), rel=1e-12)
    for p, value in zip(model.adapter_parameters(), expected, strict=True):
        assert torch.allclose(p.grad, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_whole_batch_is_that_of_both_processes(pairs):
    sides = 2 if pairs else 1
    sizes, widths, seen = (3, 2), (9, 7), []
    for n, width in zip(sizes, widths, strict=True):
        rows = tiny_batch(6, seed=n).take(torch.arange(n * sides))
        rows = type(rows)(*(v[:, :width] for v in (rows.input_ids, rows.attention_mask, rows.completion_mask)))
        reference = torch.arange(float(n * sides)) + 10 * n if pairs else None
        seen.append(Inputs(rows, torch.arange(n) % 2, pairs, reference))
    # both are run in step: what one sends is kept until the other has sent it too
    sent = {0: [], 1: []}

    def sender(rank):
        def gather(value):
            sent[rank].append(value)
            raise_if_alone = sent[1 - rank]
            place = len(sent[rank]) - 1
            both = [None, None]
            both[rank], both[1 - rank] = value, raise_if_alone[place] if place < len(raise_if_alone) else None
            if both[1 - rank] is None:
                # the first run does not know the other's shapes: those are given to it
                other = seen[1 - rank]
                size = [[len(other.group), other.rows.input_ids.shape[1], 2]]
                both[1 - rank] = torch.tensor(size) if value.shape == (1, 3) else torch.zeros_like(value)
            return torch.cat(both)

        return gather

    whole_batch(seen[1], sender(1))
    found = whole_batch(seen[0], sender(0))
    assert found.group.tolist() == [0, 1, 0, 2, 3]
    assert found.rows.input_ids.shape == (5 * sides, max(v.rows.input_ids.shape[1] for v in seen))
    for side in range(sides):
        for part, offset in ((seen[0], 0), (seen[1], 3)):
            n, width = len(part.group), part.rows.input_ids.shape[1]
            mine = slice(side * 5 + offset, side * 5 + offset + n)
            theirs = slice(side * n, side * n + n)
            assert torch.equal(found.rows.input_ids[mine, :width], part.rows.input_ids[theirs])
            assert torch.equal(found.rows.completion_mask[mine, :width], part.rows.completion_mask[theirs])
            assert not found.rows.attention_mask[mine, width:].any()
            if pairs:
                assert torch.equal(found.reference[mine], part.reference[theirs])


def test_more_processes_than_members():
    with pytest.raises(ConfigError, match="2 members"):
        own_members(2, 0, 4)
