"""What users import stays importable, wherever the code behind it is moved."""

from __future__ import annotations

import importlib

import pytest

import adaptrt

_OPTIMISERS = "adadelta adafactor adagrad adam adamax adamw asgd lbfgs muon nadam radam rmsprop rprop sgd"
_TAPE = "SGD Adam AdamW Adadelta Adagrad Adamax ASGD RMSprop Rprop NAdam RAdam Adafactor Muon"

NAMES = {
    "adaptrt": "Adapted Adjoint Backend CompiledUnroll CudaGraph Eager Exported FirstOrder Implicit Inductor Replay Result Stash Truncated "
    "Unrolled compile_unroll errors load optim stack trace where",
    "adaptrt.optim": f"{_OPTIMISERS} Optimizer PerTask Schedule Transform chain clip_by_global_norm ema learned partition per_step "
    "per_task proximal scale_by_schedule schedule scheduled sharpness_aware skip_not_finite",
    "adaptrt.errors": "AdaptrtError AlreadyImported CannotBePickled CannotBeSet CannotRecord CommitConflict CompilerUnavailable "
    "DataDependentControlFlow DeadlineExceeded DeviceMismatch InvalidArgument "
    "InvalidBatch InvalidExport InvalidGraph InvalidLoss InvalidState InvalidType LabelOutOfRange "
    "LongChain ModelChanged NonFiniteInput NotALeaf NotConverged NotDifferentiable NotExportable NotServing NotTraceable NothingToAdapt "
    "OptimizerMismatch OutOfDeviceMemory Overloaded RecordingFailed ShapeChanged StoreUnavailable "
    "TooManyTenants UnknownPyTorch UnknownTenant UnsupportedOptimizer "
    "UnsupportedParameter UnsupportedRandomness WithinTransform",
    "adaptrt.adjoint": "Adjoint FirstOrder Implicit Replay Stash Truncated Unrolled",
    "adaptrt.backend": "Backend CudaGraph Eager Inductor Tiered",
    "adaptrt.higher": "create_diff_optim get_diff_optim innerloop_ctx install monkeypatch optim patch register_optim uninstall utils",
    "adaptrt.higher.optim": "DifferentiableOptimizer apply_trainable_opt_params create_diff_optim get_diff_optim get_trainable_opt_params "
    "register_optim _get_mask_closure " + " ".join(f"Differentiable{name}" for name in _TAPE.split()),
    "adaptrt.higher.patch": "buffer_sync make_functional monkeypatch",
    "adaptrt.higher.utils": "copied flatten get_func_params settings_of _recursive_map",
    "adaptrt.serve": "Change Engine History Lifecycle MemoryStore Outcome Prediction Record RedisStore SQLiteStore SizesTaken Stats Store "
    "Sync",
    "adaptrt.serve.ray": "BuildEngine Replica ReplicaStats deployment",
    "adaptrt.serve.web": "Application Built Limits OPERATOR Principal Principals Served Server Settings Stage TENANT Tokens "
    "add_key log_to_stderr read_keys",
    "adaptrt.pytest_plugin": "Latency UnrollBenchmark unroll_benchmark",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_all_lists_every_public_name() -> None:
    assert sorted(adaptrt.__all__) == sorted(NAMES["adaptrt"].split())


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (
            adaptrt.CompiledUnroll,
            "adapt clone device evaluate examples explain fingerprint graphs has_task_axis k load module per_step predict start vmap "
            "warmup __call__",
        ),
        (adaptrt.Adapted, "params buffers opt_state num_tasks clone detach replace save state_dict unbind __call__ __getitem__ __len__"),
    ],
)
def test_classes_keep_their_attributes(owner: type, names: str) -> None:
    assert [name for name in names.split() if not hasattr(owner, name)] == []
