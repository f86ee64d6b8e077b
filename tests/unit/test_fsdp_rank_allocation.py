"""AdaLoRA: the budget, the choice of triplets and the regularizer are peft's own, step by step."""

import peft
import pytest
import torch
from torch import nn

from mcore_swift.engines.fsdp.rank_allocation import KEPT, RankAllocation
from mcore_swift.errors import UserError

STEPS = 9


def make_model() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    config = peft.AdaLoraConfig(
        target_modules=["0", "2"], init_r=6, target_r=2, tinit=1, tfinal=3, deltaT=2, total_step=STEPS,
        lora_dropout=0.0, orth_reg_weight=0.3, beta1=0.8, beta2=0.7,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_every_step_is_that_of_peft():
    theirs, ours = make_model(), make_model()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (theirs, ours)
    ]
    allocation = RankAllocation(ours, optimizers[1], ours.peft_config["default"])
    allocation.set_total_steps(STEPS)
    for step in range(1, STEPS + 1):
        x, y = torch.randn(4, 6), torch.randn(4, 5)
        loss = (theirs.base_model.model(x) - y).pow(2).mean()
        off = []
        for name, p in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                rows = p if "lora_A" in name else p.T
                off.append((rows @ rows.T - torch.eye(len(rows))).norm())
        regularizer = 0.3 * torch.stack(off).mean()
        (loss + regularizer).backward()
        optimizers[0].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[0].zero_grad()

        (10 * (ours.base_model.model(x) - y).pow(2).mean()).backward()
        assert allocation.add_orthogonality(10) == pytest.approx(float(regularizer), rel=1e-5)
        for p in ours.parameters():
            if p.grad is not None:
                p.grad /= 10
        optimizers[1].step()
        allocation.after_step(step)
        optimizers[1].zero_grad()
        for name, expected in factors(theirs).items():
            # fp32, and Adam magnifies what is near zero
            torch.testing.assert_close(factors(ours)[name], expected, rtol=1e-3, atol=1e-5)
    kept = [optimizers[1].state[p][KEPT] for n, p in ours.named_parameters() if "lora_E" in n]
    assert sum(int(k.sum()) for k in kept) == 2 * 2, "target_r for each of two layers"
    zeros = sum(int((tensor == 0).sum()) for name, tensor in factors(ours).items() if "lora_E" in name)
    assert zeros == 2 * 6 - 2 * 2


def test_phases_that_do_not_fit_are_refused():
    model = make_model()
    allocation = RankAllocation(model, torch.optim.AdamW(model.parameters()), model.peft_config["default"])
    with pytest.raises(UserError, match="--adalora_tinit 1 and --adalora_tfinal 3"):
        allocation.set_total_steps(4)
