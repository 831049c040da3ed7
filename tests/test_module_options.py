"""Every option of a loss's module can be assigned after it is made, as a schedule does: it counts, or it raises."""

import copy
import inspect
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from cases import labels
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mcld_kernels
from mcld_kernels import CKDLoss, CLKDLoss, InfoNCELoss, KDLoss, MCLDLoss, MLKDLoss, TeacherQueue

N, C = 12, 7
CHANGES = {
    MCLDLoss: {
        "temperature": (0.1, 0.3, 0.5), "weight": (1, 0, 0.5), "direction": "symmetric", "mask_same_class": True,
        "present_only": True, "ignore_index": 3, "eps": 100.0, "backend": "reference",
    },
    CKDLoss: {"temperature": 0.3, "weight": 2, "negatives": "student", "eps": 100.0, "backend": "reference"},
    CLKDLoss: {"weight": (1, 0, 2), "reduction": "sum", "eps": 100.0, "backend": "reference"},
    MLKDLoss: {
        "correlation_temperature": 0.2, "supervised_temperature": 0.3, "weight": (0, 1, 2.0), "views": 1,
        "ignore_index": 3, "eps": 100.0, "backend": "reference",
    },
    InfoNCELoss: {
        "temperature": 0.3, "positives": "label", "offset": 2, "mask_same_class": True, "normalize": False,
        "reduction": "sum", "ignore_index": 3, "eps": 100.0, "backend": "reference",
    },
    KDLoss: {"temperature": 2.0, "backend": "reference"},
}  # fmt: skip
ALL = [(kind, name, value) for kind, options in CHANGES.items() for name, value in options.items()]
WEIGHTED = [MCLDLoss, CKDLoss, CLKDLoss, MLKDLoss]
RANKS = {"process_group", "gather", "even"}  # tests of distributed.py
BAD = {
    "temperature": (0.0, "warm"), "correlation_temperature": (-1,), "supervised_temperature": (0,),
    "eps": (-1, "small"),
    "weight": (-1, "much", None, float("nan")), "direction": ("both",), "mask_same_class": (1,),
    "present_only": ("no",),
    "ignore_index": (0.5, 2**63), "negatives": ("all",), "reduction": ("most",), "views": (3,), "positives": ("none",),
    "offset": (-1,), "normalize": (None,),
}  # fmt: skip


def ids(values):
    return [f"{kind.__name__}.{name}" for kind, name, *_ in values]


def loss_of(module):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, C, generator=generator) for _ in range(2))
    if isinstance(module, InfoNCELoss):
        target = labels(N, C)
        return module(student, teacher.repeat(2, 1), target, target.repeat(2)).detach()
    return module(student, teacher, labels(N, C)).detach()


def test_every_argument_is_tried():
    for kind, options in CHANGES.items():
        arguments = set(inspect.signature(kind).parameters) - RANKS
        assert arguments - set(options) <= {"warmup", "warmup_steps", "uncertainty_weighting", "learnable"}, kind


@pytest.mark.parametrize("kind, name, value", ALL, ids=ids(ALL))
def test_an_assigned_option_counts_as_one_given(kind, name, value):
    module, wanted = kind(), kind(**{name: value})
    if name == "ignore_index" and kind is InfoNCELoss:
        module.positives = wanted.positives = "label"
    before = loss_of(module)
    setattr(module, name, value)
    torch.testing.assert_close(loss_of(module), loss_of(wanted), rtol=0, atol=0)
    assert repr(module) == repr(wanted)
    assert name == "backend" or (kind, name) == (MCLDLoss, "present_only") or not torch.equal(before, loss_of(module))
    if name != "weight":
        assert getattr(module, name) == getattr(wanted, name)


def bad_values():
    return [(kind, name, value) for kind, name, _ in ALL if name != "backend" for value in BAD[name]]


@pytest.mark.parametrize("kind, name, value", bad_values(), ids=ids(bad_values()))
def test_a_bad_value_raises_as_in_the_constructor_and_changes_nothing(kind, name, value):
    module = kind()
    before = loss_of(module)
    with pytest.raises((TypeError, ValueError)) as wanted:
        kind(**{name: value})
    with pytest.raises(type(wanted.value)) as error:
        setattr(module, name, value)
    assert str(error.value) == str(wanted.value) and name in str(error.value)
    assert torch.equal(loss_of(module), before)


def test_a_bad_backend_raises_at_the_call():
    module = CKDLoss()
    module.backend = "none"
    with pytest.raises(ValueError, match="backend"):
        loss_of(module)


class TestWeight:
    """Numbers, a tensor and a parameter, each in place of each."""

    @staticmethod
    def numbers(kind, scale=1.0):
        return 2.0 * scale if kind is CKDLoss else (2.0 * scale, 1.0, 0.5)

    @pytest.mark.parametrize("kind", WEIGHTED)
    @pytest.mark.parametrize("first", ["numbers", "tensor", "parameter"])
    @pytest.mark.parametrize("second", ["numbers", "tensor", "parameter"])
    def test_each_in_place_of_each(self, kind, first, second):
        def made(form, scale):
            numbers = self.numbers(kind, scale)
            tensor = torch.tensor(numbers)
            return {"numbers": numbers, "tensor": tensor, "parameter": nn.Parameter(tensor)}[form]

        module, wanted = kind(weight=made(first, 3.0)), kind(weight=made(second, 1.0))
        held = module.weight
        if (first, second) == ("parameter", "tensor"):
            with pytest.raises(TypeError, match="parameter 'weight'"):  # PyTorch's own words name the remedy
                module.weight = made(second, 1.0)
            return
        module.weight = made(second, 1.0)
        torch.testing.assert_close(loss_of(module), loss_of(wanted), rtol=0, atol=0)
        if (first, second) == ("parameter", "numbers"):
            assert module.weight is held and dict(module.named_parameters())["weight"] is held
        else:
            assert module.state_dict().keys() == wanted.state_dict().keys()
            assert dict(module.named_parameters()).keys() == dict(wanted.named_parameters()).keys()

    def test_a_removed_term_needs_no_labels_any_more(self):
        module = MCLDLoss()
        module.weight = (1, 0, 1)
        assert module(torch.randn(4, 3), torch.randn(4, 3)).isfinite()

    def test_of_a_learned_weight_keeps_the_term_that_was_removed(self):
        module, wanted = MCLDLoss(uncertainty_weighting=True), MCLDLoss(weight=(2, 0, 1), uncertainty_weighting=True)
        module.weight = (2, 0, 1)
        torch.testing.assert_close(loss_of(module), loss_of(wanted), rtol=0, atol=0)
        module.reset_parameters()
        assert module.weight.tolist() == [2, 0, 1]

    def test_a_schedule_does_not_reach_a_copy_and_goes_into_a_pickle(self):
        module = MCLDLoss()
        twin = copy.deepcopy(module)
        module.weight, module.eps = (1, 2, 3), 1e-3
        assert twin.options.term_weight == (1, 1, 1) and twin.eps == 1e-12
        assert pickle.loads(pickle.dumps(module)).options == module.options

    def test_a_checkpoint_is_assigned(self):
        module, other = MCLDLoss(weight=torch.tensor([1.0, 2.0, 3.0])), MCLDLoss(weight=torch.ones(3))
        other.load_state_dict(module.state_dict(), assign=True)
        torch.testing.assert_close(loss_of(other), loss_of(module), rtol=0, atol=0)


class TestTemperatureOfInfoNCE:
    def test_a_parameter_is_set_in_place(self):
        held = nn.Parameter(torch.tensor(0.5))
        for module in (InfoNCELoss(temperature=held), InfoNCELoss(learnable=True)):
            names = [name for name, _ in module.named_parameters()]
            module.temperature = 0.25
            assert [name for name, _ in module.named_parameters()] == names
            torch.testing.assert_close(loss_of(module), loss_of(InfoNCELoss(temperature=0.25)))
            assert float(module.temperature.detach()) == pytest.approx(0.25)
        assert held.item() == 0.25

    def test_a_tensor_and_a_parameter_in_place_of_a_number(self):
        module = InfoNCELoss()
        module.temperature = torch.tensor(0.25)
        torch.testing.assert_close(loss_of(module), loss_of(InfoNCELoss(temperature=0.25)))
        module.temperature = nn.Parameter(torch.tensor(0.5))
        assert [name for name, _ in module.named_parameters()] == ["temperature_tensor"]
        torch.testing.assert_close(loss_of(module), loss_of(InfoNCELoss(temperature=0.5)))

    @pytest.mark.parametrize("module", [InfoNCELoss(), InfoNCELoss(learnable=True)], ids=["number", "learnable"])
    def test_a_bad_one_raises(self, module):
        with pytest.raises(ValueError, match="temperature must be positive"):
            module.temperature = 0.0
        with pytest.raises(ValueError, match="shape"):
            module.temperature = torch.ones(2)


class TestWarmup:
    def test_an_assigned_ramp_counts(self):
        module = MCLDLoss()
        module.warmup = 4
        module.set_epoch(1)
        assert module.effective_weight.tolist() == [1, 1, 0.25]
        module.warmup, module.warmup_steps = 0, 2
        loss_of(module)
        with torch.enable_grad():
            module(torch.randn(4, 3), torch.randn(4, 3), labels(4, 3))
        assert module.state_dict()["steps"] == 2 and module.effective_weight[2] == 1
        module.warmup_steps = 0
        assert "steps" not in module.state_dict()

    @pytest.mark.parametrize(
        "name, value", [("warmup", -1), ("warmup", "x"), ("warmup_steps", -1), ("warmup_steps", 1.5)]
    )
    def test_a_bad_one_raises(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(MCLDLoss(), name, value)


@pytest.mark.parametrize(
    "made, name, value",
    [
        (lambda: MCLDLoss(), "uncertainty_weighting", True),
        (lambda: InfoNCELoss(), "learnable", True),
        (lambda: TeacherQueue(4, 3), "size", 8),
        (lambda: TeacherQueue(4, 3), "classes", 5),
    ],
    ids=["uncertainty_weighting", "learnable", "size", "classes"],
)
def test_what_only_the_constructor_can_choose_says_so(made, name, value):
    module = made()
    with pytest.raises(AttributeError, match=f"{name} is chosen when the module is made: make another"):
        setattr(module, name, value)
    assert getattr(copy.deepcopy(module), name) != value


def test_options_of_a_queue():
    queue = TeacherQueue(4, 3)
    queue.ignore_index, queue.eps = -1, 100.0
    queue.enqueue(torch.ones(2, 3))
    assert queue.target.tolist() == [-1, -1] and not queue.candidates.any()
    with pytest.raises(ValueError, match="eps"):
        queue.eps = -1
    with pytest.raises(TypeError, match="ignore_index"):
        queue.ignore_index = 0.5


def test_a_compiled_module_takes_a_new_option():
    module = MCLDLoss(backend="torch")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    loss_of(compiled)
    module.weight, module.temperature, module.eps = (1, 2, 0.5), 0.4, 1e-6
    wanted = MCLDLoss(weight=(1, 2, 0.5), temperature=0.4, eps=1e-6, backend="torch")
    torch.testing.assert_close(loss_of(compiled), loss_of(wanted))


def test_parameters_that_fsdp_has_sharded_are_set_in_place():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(MCLDLoss(weight=nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        (criterion,) = model
        held = criterion.weight
        criterion.weight = (3.0, 2.0, 1.0)
        assert criterion.weight is held and held.full_tensor().tolist() == [3.0, 2.0, 1.0]
        with torch.no_grad():
            held.fill_(77)
        criterion.reset_parameters()
        assert held.full_tensor().tolist() == [3.0, 2.0, 1.0] and repr(model)
        model = nn.Sequential(InfoNCELoss(temperature=torch.tensor([0.3]), learnable=True))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        (criterion,) = model
        held = criterion.log_temperature
        criterion.temperature = 0.5
        assert criterion.log_temperature is held and held.full_tensor().exp().tolist() == pytest.approx([0.5])
        with torch.no_grad():
            held.fill_(77)
        criterion.reset_parameters()
        assert held.full_tensor().exp().tolist() == pytest.approx([0.5]) and repr(model)
        # The root is what is called: its hook gathers the parameters.
        model = InfoNCELoss(temperature=torch.tensor([0.5]), learnable=True)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(loss_of(model), loss_of(InfoNCELoss(temperature=0.5)))
    finally:
        dist.destroy_process_group()
        time.sleep(0.5)  # a thread of gloo ends (tests of docs/distributed.md say why)


def test_ranks_are_checked_where_they_are_assigned():
    module = CKDLoss()
    module.even = True
    assert module.even and module.ranks is None
    for name, value in (("gather", "some"), ("even", 1)):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(module, name, value)
    assert mcld_kernels.CLKDLoss().gather == "all"


class TestOnMeta:
    """A model is printed, moved to "meta", given memory again by to_empty, and has its values by reset_parameters."""

    WEIGHT = torch.tensor((2.0, 1.0, 0.5))
    MADE = {
        **{kind.__name__: kind for kind in CHANGES},
        "learnable": lambda: InfoNCELoss(learnable=True, temperature=0.3),
        "learnable, one element": lambda: InfoNCELoss(learnable=True, temperature=torch.tensor([0.3])),
        "temperature, buffer": lambda: InfoNCELoss(temperature=torch.tensor(0.3)),
        "temperature, parameter": lambda: InfoNCELoss(temperature=nn.Parameter(torch.tensor([0.3]))),
        "MCLD, buffer": lambda: MCLDLoss(weight=TestOnMeta.WEIGHT.clone(), warmup_steps=3),
        "MCLD, learned": lambda: MCLDLoss(weight=(2.0, 1.0, 0.5), uncertainty_weighting=True),
        "CKD, buffer": lambda: CKDLoss(weight=torch.tensor(2.0)),
        "CKD, parameter": lambda: CKDLoss(weight=nn.Parameter(torch.tensor([2.0]))),
        "CLKD, buffer": lambda: CLKDLoss(weight=TestOnMeta.WEIGHT.clone()),
        "MLKD, parameter": lambda: MLKDLoss(weight=nn.Parameter(TestOnMeta.WEIGHT.clone())),
    }

    @staticmethod
    def held(module):
        return {name: x.detach().clone() for name, x in (*module.named_parameters(), *module.named_buffers())}

    def spoiled(self, module):
        """As after to_empty, whose memory holds anything."""
        module = module.to_empty(device="cpu")
        with torch.no_grad():
            for x in (*module.parameters(), *module.buffers()):
                x.fill_(77)
        return module

    @pytest.mark.parametrize("name", MADE)
    def test_moved_there_and_back(self, name):
        module = self.MADE[name]()
        before, wanted, text = self.held(module), loss_of(module), repr(module)
        module = module.to("meta")
        assert type(module).__name__ in repr(nn.Sequential(module)) and f"{module}"
        module = self.spoiled(module)
        if before:
            module.reset_parameters()
        for key, x in self.held(module).items():
            assert torch.equal(x, before[key]) and x.dtype is before[key].dtype, key
        assert torch.equal(loss_of(module), wanted) and repr(module) == text

    @pytest.mark.parametrize("name", ["learnable", "MCLD, learned", "MCLDLoss"])
    def test_made_there_of_numbers(self, name):
        wanted = self.held(self.MADE[name]())
        with torch.device("meta"):
            module = self.MADE[name]()
        assert repr(module)
        module = self.spoiled(module)
        module.reset_parameters()
        for key, x in self.held(module).items():
            assert torch.equal(x, wanted[key]), key

    def test_assigned_values_count_as_given(self):
        cases = (
            (InfoNCELoss(learnable=True), "temperature", 0.5), (InfoNCELoss(), "temperature", torch.tensor(0.5)),
            (InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.1))), "temperature", 0.5),
            (CKDLoss(), "weight", torch.tensor(3.0)), (CKDLoss(weight=nn.Parameter(torch.tensor(1.0))), "weight", 3),
            (MCLDLoss(uncertainty_weighting=True), "weight", (2, 0, 1)), (MLKDLoss(), "weight", self.WEIGHT.clone()),
        )  # fmt: skip
        for module, name, value in cases:
            setattr(module, name, value)
            wanted = self.held(module)
            module = self.spoiled(module.to("meta"))
            module.reset_parameters()
            for key, x in self.held(module).items():
                assert torch.equal(x, wanted[key]), (module, key)

    def test_a_tensor_that_gave_way_to_numbers_is_forgotten(self):
        for module, name in (
            (InfoNCELoss(temperature=torch.tensor(0.5)), "temperature"),
            (CKDLoss(weight=torch.tensor(3.0)), "weight"),
        ):
            setattr(module, name, 0.2)
            module.reset_parameters()
            assert not list(module.buffers()) and repr(module)
