"""Training in two real processes, launched by torchrun: the gradients, the parameters and the files of one process."""

import contextlib
import functools
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import adapter_state, assert_same_state, batch_for, batches_for, build, randomise, router_of
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import tucka

SIZES = dict(r=4, k=3, t=2, p=2, init_router="kaiming", init_experts="identity")
"""The library's defaults otherwise: factors shared by layers, a shared expert, bounded parameters, routed samples."""

CASES = {
    "ddp": dict(),
    "ddp, accumulated": dict(parts=2),
    "ddp, core, bias": dict(trainable="core", balance_bias=True, balance_rate=0.2),
    "ddp, lasso, groups that nobody chose": dict(lasso=0.1, k=8, shared_expert=False, share_factors=False),
    "ddp, gates that are signs": dict(affinity="paper", t=1),
    "ddp, one route": dict(routing="batch", sync_route=True),
    "fsdp": dict(),
    "fsdp, accumulated": dict(parts=2),
    "fsdp, kept whole after forward": dict(reshard_after_forward=False),
    "fsdp, checkpointed": dict(name="llama", checkpointing=dict(use_reentrant=False)),
    "fsdp, checkpointed, reentrant": dict(name="llama", checkpointing=dict(use_reentrant=True)),
    "fsdp, tied, bias": dict(form="multiplicative", normalize=False, balance_bias=True, balance_rate=0.2),
    "fsdp, lasso, routed in the last block alone": dict(name="llama", lasso=0.1, router_depth=1),
    "fsdp, inputs shared": dict(name="llama", form="multiplicative", normalize=False, share_inputs=True),
}


def model_for(name="bert", dtype=torch.float64, checkpointing=None, **fields):
    """A randomised model in training mode, the same in every process."""
    torch.manual_seed(0)
    model = randomise(tucka.apply(build(name, dtype), tucka.TuckAConfig(**{**SIZES, **fields}))).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def sharded(model, **options):
    """Every block by itself, then the rest, as PyTorch's manual has it."""
    for module in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(module, **options)
    return fully_shard(model, **options)


def rows(batch, start, stop):
    return {key: value[start:stop] for key, value in batch.items()}


@contextlib.contextmanager
def unsynchronised(model):
    """Leave the gradient of one micro-batch unreduced."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def full_state(model):
    """A full state dict, on the first process alone where the model is sharded."""
    if isinstance(model, FSDPModule):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {key: value.clone() for key, value in getattr(model, "module", model).state_dict().items()}


def trained(model, batch, parts=1, steps=2):
    """Gradients of the first step, and the state after the last; a step takes the batch in so many parts."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    size, gradients = len(batch["labels"]) // parts, None
    with torch.no_grad():
        model(**batch)  # an evaluation, which may leave the blocks of a sharded model whole
    for _ in range(steps):
        for part in range(parts):
            last = part == parts - 1
            with contextlib.nullcontext() if last else unsynchronised(model):
                (model(**rows(batch, part * size, (part + 1) * size)).loss / parts).backward()
        gradients = gradients or {
            key.removeprefix("module."): whole(p.grad).clone() for key, p in model.named_parameters() if p.requires_grad
        }
        optimiser.step(), optimiser.zero_grad()
    return gradients, {key: value for key, value in full_state(model).items() if ".tucka_" in key}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, distributed.tensor.DTensor) else tensor


def case_model(case, parts=1, reshard_after_forward=None, name="bert", **fields):
    """The model and the whole batch of a case, and how a process wraps the model."""
    options = {} if reshard_after_forward is None else dict(reshard_after_forward=reshard_after_forward)
    wrap = DistributedDataParallel if case.startswith("ddp") else functools.partial(sharded, **options)
    return model_for(name, **fields), batch_for(name, samples=4, dtype=torch.float64), wrap


# --- what every process does -----------------------------------------------------------------------------------------


def run_cases(rank, directory):
    found = {}
    for case, options in CASES.items():
        model, batch, wrap = case_model(case, **options)
        wrapped = wrap(model)  # DistributedDataParallel, as it is: it raises over a parameter without a gradient
        found[case] = trained(wrapped, rows(batch, 2 * rank, 2 * rank + 2), options.get("parts", 1))
        if case in ("ddp", "fsdp"):
            state = full_state(wrapped)
            if rank == 0:
                model.save_pretrained(directory / case, state_dict=state)
    return found


def run_in_half_precision(rank):
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(model_for("llama", torch.float32), mp_policy=half)
    return trained(model, rows(batch_for("llama", samples=4), 2 * rank, 2 * rank + 2), steps=1)[0]


def run_refusals():
    """What is raised where a router or experts would start in a sharded model."""
    refused = []
    model = sharded(model_for(init_router="perturb"))
    for attempt in (
        lambda: model(**batch_for("bert", dtype=torch.float64)),
        lambda: tucka.initialize(model, batches_for("bert"), progress=False),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            attempt()
        refused.append(str(caught.value))
    return refused


def run_failing_calibrations(rank):
    """One process raises, early or late: every process's error, and whether its model is as it was."""

    def loss(output, batch):
        raise KeyError("loss of the first process")

    fields = dict(init_router="kmeans", init_experts="gradient")
    model, batches = model_for(dtype=torch.float32, **fields), batches_for("bert", samples=24)
    before, outcomes = adapter_state(model), []
    for options in (
        dict(calibration=[] if rank == 1 else batches),
        dict(calibration=batches, loss=loss if rank == 0 else None),
    ):
        with pytest.raises((ValueError, KeyError, tucka.processes.OtherProcessError)) as caught:
            tucka.initialize(model, progress=False, **options)
        assert_same_state(adapter_state(model), before)
        outcomes.append((caught.type.__name__, str(caught.value)))
    tucka.initialize(model, batches, progress=False)  # nobody is a message ahead of the other
    return outcomes, adapter_state(model)


def run_trainer(directory, per_device):
    """The Trainer over four micro-batches of two samples, or two of four; rank 0 saves."""
    torch.manual_seed(0)
    samples = [{key: value[0] for key, value in batch.items()} for batch in batches_for("llama", samples=16, size=1)]
    config = tucka.TuckAConfig(r=4, k=2, t=2, p=2)
    steps = dict(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=per_device)
    quiet = dict(save_strategy="no", report_to="none", disable_tqdm=True)
    # Adam would make steps of the rounding of gradients that are zero.
    optimiser = dict(optim="sgd", learning_rate=0.1, ddp_find_unused_parameters=False)
    arguments = TrainingArguments(directory / "out", use_cpu=True, **steps, **optimiser, **quiet)
    batches = batches_for("llama", samples=16, padded=False)
    model = tucka.apply(build("llama"), config, calibration=batches, progress=False)
    trainer = Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(str(directory / "trainer"))


def run_accelerate(rank, directory):
    """FSDP2 as accelerate sets it up. It does so for accelerators alone; here it is told that the CPU is one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    told = dict(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    AcceleratorState._shared_state.update(told)
    PartialState._shared_state.update(distributed_type=DistributedType.FSDP)
    model = model_for("llama")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model, optimiser = accelerator.prepare(model, optimiser)
    batch = rows(batch_for("llama", samples=4), 2 * rank, 2 * rank + 2)

    def step():
        accelerator.backward(model(**batch).loss)
        optimiser.step(), optimiser.zero_grad()

    step()
    accelerator.save_state(str(directory / "state"))
    step()
    state = accelerator.get_state_dict(model)
    model.save_pretrained(directory / "accelerate", state_dict=state, is_main_process=accelerator.is_main_process)
    accelerator.load_state(str(directory / "state"))
    step()
    return sum(isinstance(module, FSDPModule) for module in model.modules()), accelerator.get_state_dict(model)


def main(directory):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = {
        "cases": run_cases(rank, directory),
        "half precision": run_in_half_precision(rank),
        "refused": run_refusals(),
        "failing": run_failing_calibrations(rank),
        "trainer": run_trainer(directory, per_device=2),
        "accelerate": run_accelerate(rank, directory),
    }
    torch.save(found, directory / f"{rank}.pt")
    distributed.destroy_process_group()


# --- what a single process does --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each of two processes found, and where they wrote; launched once, also where pytest runs several workers."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "launched"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            directory.mkdir()
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
            run = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=900)
            (directory / "error").write_text(run.stderr[-5000:] if run.returncode else "")
    assert not (directory / "error").read_text(), (directory / "error").read_text()
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)], directory


@functools.cache
def alone(case):
    model, batch, _ = case_model(case, **CASES[case])
    gradients, state = trained(model, batch)
    return gradients, state, model


def assert_same_file(found, expected, tolerance=1e-6):
    found, expected = (load_file(directory / "adapter_model.safetensors") for directory in (found, expected))
    assert_same_state(found, expected, tolerance)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(launched, case):
    """Gradients of half a batch each are those of the whole batch, and so are the parameters after two steps."""
    ranks, _ = launched
    gradients, state, _ = alone(case)
    for rank, found in enumerate(ranks):
        assert_same_state(found["cases"][case][0], gradients, 1e-10)
        if rank == 0 or case.startswith("ddp"):
            assert_same_state(found["cases"][case][1], state, 1e-10)


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_the_saved_file_is_that_of_one_process(launched, case, tmp_path):
    model = alone(case)[2]
    model.save_pretrained(tmp_path)
    assert_same_file(launched[1] / case, tmp_path)


def test_half_precision_of_fsdp_leaves_parameters_and_routes_in_single(launched):
    exact, _ = trained(model_for("llama", torch.float32), batch_for("llama", samples=4), steps=1)
    for found in launched[0]:
        gradients = found["half precision"]
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        flat, expected = (torch.cat([g[key].flatten() for key in exact]) for g in (gradients, exact))
        assert float((flat - expected).norm() / expected.norm()) < 0.03


def test_nothing_starts_in_a_sharded_model(launched):
    for found in launched[0]:
        forward, calibration = found["refused"]
        assert "the router of adapter 'default' would start from this batch" in forward
        assert "calibration=..." in forward
        assert "adapter 'default' is sharded over processes" in calibration


def test_all_processes_raise_if_one_fails_in_calibration(launched):
    """The error of the one, and in the other an error that tells it; then both calibrate, to one start."""
    (first, start), (second, other) = (found["failing"] for found in launched[0])
    assert [kind for kind, _ in first] == ["OtherProcessError", "KeyError"]
    assert [kind for kind, _ in second] == ["ValueError", "OtherProcessError"]
    assert "process 1 of the distributed run raised ValueError: calibration yields no batch" in first[0][1]
    assert "process 0 of the distributed run raised KeyError: 'loss of the first process'" in second[1][1]
    assert_same_state(other, start)


def test_the_trainer_saves_what_one_process_would(launched, tmp_path):
    """Accumulation included: 2 processes × 2 micro-batches × 2 samples, and 2 micro-batches × 4 samples."""
    run_trainer(tmp_path, per_device=4)
    assert_same_file(launched[1] / "trainer", tmp_path / "trainer", 1e-5)
    model = PeftModel.from_pretrained(build("llama"), str(launched[1] / "trainer"))
    loaded = load_file(launched[1] / "trainer" / "adapter_model.safetensors")
    assert torch.equal(router_of(model).centroids, next(v for k, v in loaded.items() if k.endswith("centroids")))


def test_fsdp_of_accelerate_saves_and_resumes(launched, tmp_path):
    model, batch = model_for("llama"), batch_for("llama", samples=4)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(**batch).loss.backward()
        optimiser.step(), optimiser.zero_grad()
    model.save_pretrained(tmp_path)
    assert_same_file(launched[1] / "accelerate", tmp_path)
    groups, resumed = launched[0][0]["accelerate"]
    assert groups >= 3  # two blocks and the rest
    assert_same_state({k: v for k, v in resumed.items() if ".tucka_" in k}, adapter_state(model), 1e-10)


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_accumulation_is_the_whole_batch_where_samples_are_routed(routing):
    """With batch routing every micro-batch is a batch, with a route of its own."""

    def gradients(parts):
        model, batch = model_for(routing=routing), batch_for("bert", samples=4, dtype=torch.float64)
        for start in range(0, 4, 4 // parts):
            (model(**rows(batch, start, start + 4 // parts)).loss / parts).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    accumulated, at_once = gradients(4), gradients(1)
    if routing == "sample":
        assert_same_state(accumulated, at_once, 1e-10)
    else:
        assert any(not torch.allclose(accumulated[key], at_once[key]) for key in at_once)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
