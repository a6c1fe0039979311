"""PEFT knows the method, and importing it costs and changes nothing else."""

import pickle
import subprocess
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import tucka
from tucka.registration import PEFT_TYPE, add_peft_type, register


def test_the_enum_member_behaves_like_any():
    member = PeftType.TUCKA
    assert isinstance(member, PeftType) and member == "TUCKA" and member.value == member.name == "TUCKA"
    assert PeftType("TUCKA") is member is PeftType["TUCKA"] and member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "TUCKA")


def test_registration_is_complete_and_may_be_repeated():
    before = len(PeftType)
    register(tucka.TuckAConfig, tucka.TuckAModel)
    assert len(PeftType) == before and add_peft_type(PEFT_TYPE) is PeftType.TUCKA
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TUCKA] is tucka.TuckAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TUCKA] is tucka.model.TuckAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TUCKA] == "tucka_"


def test_importing_tucka_adds_no_plotting_or_learning_library_and_keeps_tensorlys_backend():
    """One interpreter for all that is asked of imports: starting one takes seconds."""
    script = (
        "import sys, peft, tensorly; before = tensorly.get_backend(); known = set(sys.modules);"
        "import tucka; added = {name.partition('.')[0] for name in set(sys.modules) - known};"
        "assert not added & {'matplotlib', 'sklearn', 'pandas'}, added;"
        "assert tensorly.get_backend() == before;"
        "assert not {'tucka.callbacks', 'transformers.trainer_callback'} & set(sys.modules);"
        "import tucka.revival, tucka.balance, tucka.optim, tucka.callbacks;"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names():
    assert set(tucka.__all__) == {
        "Route", "TuckAConfig", "__version__", "apply", "balance", "doctor", "expand", "export", "from_loras",
        "hold_unselected", "initialize", "last_checkpoint", "param_groups", "pin_route", "record_loads",
        "record_routes", "revive", "save", "suggest_ranks", "to_lora", "truncate",
    }  # fmt: skip
    assert callable(tucka.apply)
