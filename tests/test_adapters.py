"""The adapters inside the real frameworks: each against the same training, or the same loss, written by hand."""

import copy
import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision_shim
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import mcld_kernels
from mcld_kernels import KDLoss, MCLDLoss

PYTHON = Path(__file__).resolve().parent.parent / "python"
sys.path.append(str(PYTHON))
OPTIONS = {"temperature": 0.5, "weight": 3.0}


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def frameworks_import():
    torchvision_shim.install()
    torch.manual_seed(0)


def small_models():
    """A student and a teacher: images (B, 3, 4, 4) to logits (B, 10)."""
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)) for _ in range(2))
    return student, teacher.eval().requires_grad_(False)


def small_data(count=32):
    return TensorDataset(torch.randn(count, 3, 4, 4), torch.randint(10, (count,)))


@needs("timm")
class TestTimm:
    @pytest.fixture
    def models(self):
        import timm

        return [timm.create_model("test_resnet", num_classes=10) for _ in range(2)]

    def task(self, models, loss, **options):
        from adapters.timm_task import LossTask

        return LossTask(*models, criterion=nn.CrossEntropyLoss(), distill_loss=loss, verbose=False, **options).train()

    def test_with_the_kl_divergence_it_is_timms_own_task(self, models):
        from timm.task import LogitDistillationTask

        images, target = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
        weights = {"task_loss_weight": 0.3, "distill_loss_weight": 2.0}
        timms = LogitDistillationTask(
            *models, criterion=nn.CrossEntropyLoss(), temperature=3.0, verbose=False, **weights
        ).train()
        ours = self.task(models, KDLoss(temperature=3.0), **weights)
        parameter = models[0].get_classifier().weight
        results = [task(images, target) for task in (timms, ours)]
        for name in ("loss", "task_loss", "kd_loss"):
            torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(result["loss"], parameter)[0] for result in results), rtol=1e-4, atol=1e-6
        )

    def test_the_count_of_steps_is_in_timms_checkpoints(self, models, tmp_path):
        from timm.task import resume_task_checkpoint

        task = self.task(models, MCLDLoss(**OPTIONS, warmup_steps=8))
        for _ in range(2):
            task(torch.randn(4, 3, 64, 64), torch.randint(10, (4,)))["loss"].backward()
        assert all(parameter.grad is None for parameter in models[1].parameters())
        assert float(task.distill_loss.effective_weight[2]) == pytest.approx(3 * 2 / 8)
        torch.save(task.get_checkpoint_state(), tmp_path / "last.pth.tar")
        resumed = self.task(models, MCLDLoss(**OPTIONS, warmup_steps=8))
        resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), log_info=False)
        assert float(resumed.distill_loss.effective_weight[2]) == pytest.approx(3 * 2 / 8)
        assert not task.get_task_state(ema=True)

    def test_a_soft_target_is_its_most_likely_class_or_stays(self, models):
        heard = []

        class Recorder(nn.Module):
            def forward(self, student, teacher, target):
                heard.append(target)
                return (student - teacher).square().mean()

        soft = torch.rand(4, 10).softmax(1)
        for soft_labels in (False, True):
            self.task(models, Recorder(), soft_labels=soft_labels)(torch.randn(4, 3, 64, 64), soft)
        assert torch.equal(heard[0], soft.argmax(1)) and heard[1] is soft
        with_soft_labels = self.task(models, MCLDLoss(**OPTIONS), soft_labels=True)
        with_soft_labels(torch.randn(4, 3, 64, 64), soft)["loss"].backward()

    def test_a_script_of_timm_gets_the_loss_and_its_own_arguments(self, monkeypatch, tmp_path, capsys):
        import timm.task
        from adapters import timm_task

        monkeypatch.setattr(timm.task, "LogitDistillationTask", timm.task.LogitDistillationTask)
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "beside.py").write_text("NAME = 'beside'")
        (tmp_path / "train.py").write_text(
            "import sys, timm, beside\n"
            "from timm.task import LogitDistillationTask\n"
            "models = [timm.create_model('test_resnet', num_classes=10) for _ in range(2)]\n"
            "task = LogitDistillationTask(student_model=models[0], teacher_model=models[1], loss_type='kl',\n"
            "                             temperature=4.0, verbose=False)\n"
            "print(beside.NAME, sys.argv[1:], task.distill_loss, task.soft_labels)\n"
        )
        loss = ["MCLDLoss", "temperature=0.5", "direction=symmetric", "warmup_steps=7"]
        timm_task.main([*loss, "--", str(tmp_path / "train.py"), "--lr", "0.1"])
        printed = capsys.readouterr().out
        assert "beside ['--lr', '0.1'] MCLDLoss(temperature=0.5, direction='symmetric'" in printed
        assert "warmup_steps=7" in printed and printed.endswith("False\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["MCLDLoss"], "usage: timm_task.py LOSS"),
            (["MCLDLos", "--", "train.py"], "has no loss 'MCLDLos'; it has .*MCLDLoss"),
            (["MCLDLoss", "warmup=-1", "--", "train.py"], "MCLDLoss: warmup must be a finite number"),
            (["MCLDLoss", "uncertainty_weighting=True", "--", "train.py"], "the loss has parameters"),
            (["MCLDLoss", "0.5", "--", "train.py"], "'0.5' is not an option of the form key=value"),
        ],
    )
    def test_bad_arguments_end_with_a_message(self, arguments, message):
        from adapters import timm_task

        with pytest.raises(SystemExit, match=message):
            timm_task.main(arguments)


@needs("torchdistill", "yaml")
class TestTorchdistill:
    def box(self, student, teacher, data, batch=8, **config):
        import yaml
        from adapters import torchdistill_loss  # noqa: F401
        from torchdistill.core.distillation import DistillationBox

        config = yaml.safe_load((PYTHON / "adapters" / "torchdistill_loss.yaml").read_text()) | {
            "num_epochs": 2,
            "train_data_loader": {
                "dataset_id": "data",
                "requires_supp": True,
                "kwargs": {"batch_size": batch},
                "sampler": {"class_or_func": RandomSampler},
            },
            "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
        }
        return DistillationBox(teacher, student, {"data": data}, config, torch.device("cpu"), None, False, 1)

    def test_the_yaml_trains_with_cross_entropy_and_the_loss_and_warms_up(self):
        student, teacher = small_models()
        box = self.box(student, teacher, small_data())
        by_hand = MCLDLoss(**OPTIONS, warmup=20)
        for epoch in range(2):
            box.pre_epoch_process(epoch=epoch)
            by_hand.set_epoch(epoch)
            for sample_batch, targets, supp_dict in box.train_data_loader:
                logits = student(sample_batch)
                expected = F.cross_entropy(logits, targets) + by_hand(logits, teacher(sample_batch), targets)
                loss = box.forward_process(sample_batch, targets=targets, supp_dict=supp_dict)
                torch.testing.assert_close(loss, expected)
                box.post_forward_process(loss=loss)
        assert float(box.criterion.term_dict["mcld"][0].loss.effective_weight[2]) == pytest.approx(3 / 20)

    def test_the_kl_divergence_is_torchdistills_own(self):
        from adapters.torchdistill_loss import LogitLoss
        from torchdistill.losses.mid_level import KDLoss as Theirs

        student, teacher = torch.randn(2, 8, 10)
        target = torch.randint(10, (8,))
        io = [{".": {"output": logits}} for logits in (student, teacher)]
        theirs = Theirs(".", "output", ".", "output", temperature=3.0, alpha=0.5)(*io, target)
        ours = 0.5 * F.cross_entropy(student, target) + 0.5 * LogitLoss("KDLoss", temperature=3.0)(*io, target)
        torch.testing.assert_close(ours, theirs)

    def test_an_unknown_loss_is_named(self):
        from adapters.torchdistill_loss import LogitLoss

        with pytest.raises(ValueError, match="has no loss 'mcld_loss'; it has .*MCLDLoss"):
            LogitLoss("mcld_loss")
        with pytest.raises(ValueError, match="InfoNCELoss has parameters"):
            LogitLoss("InfoNCELoss", learnable=True)


@needs("lightning")
class TestLightning:
    def fit(self, module, data, folder, epochs=2, **options):
        import lightning as L

        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8), **options)
        return trainer

    @pytest.fixture
    def module(self):
        from adapters.lightning_module import Distillation

        def make(student, teacher, loss):
            return Distillation(student, teacher, loss, optimizer=lambda values: torch.optim.SGD(values, lr=0.1))

        return make

    @pytest.mark.parametrize("loss", [MCLDLoss(**OPTIONS, warmup=2), KDLoss()], ids=["mcld", "kd"])
    def test_it_is_the_plain_loop(self, module, loss, tmp_path):
        student, teacher = small_models()
        data, plain = small_data(), copy.deepcopy(student)
        trainer = self.fit(module(student, teacher, loss), data, tmp_path)
        assert not teacher.training and "val/accuracy" in trainer.callback_metrics
        assert ("train/category" in trainer.callback_metrics) == isinstance(loss, MCLDLoss)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for epoch in range(2):
            for step, (images, target) in enumerate(batches := DataLoader(data, 8)):
                if isinstance(loss, MCLDLoss):
                    loss.set_epoch(epoch + step / len(batches))
                logits = plain(images)
                optimizer.zero_grad()
                (F.cross_entropy(logits, target) + loss(logits, teacher(images), target)).backward()
                optimizer.step()
        for ours, expected in zip(student.parameters(), plain.parameters()):
            torch.testing.assert_close(ours, expected)

    def test_a_checkpoint_has_no_teacher_and_goes_on_with_the_warm_up(self, module, tmp_path):
        student, teacher = small_models()
        first = module(student, teacher, MCLDLoss(**OPTIONS, warmup_steps=100))
        data = small_data()
        self.fit(first, data, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
        assert saved and not any(name.startswith("teacher.") for name in saved)
        second = module(small_models()[0], teacher, MCLDLoss(**OPTIONS, warmup_steps=100))
        self.fit(second, data, tmp_path, epochs=3, ckpt_path=tmp_path / "last.ckpt")
        assert float(second.loss.effective_weight[2]) == pytest.approx(3 * 12 / 100)
        assert torch.equal(second.teacher[1].weight, teacher[1].weight)

    @pytest.mark.skipif(not hasattr(MCLDLoss(), "process_group"), reason="this version's losses know no process group")
    def test_two_ranks_are_one_process_with_the_whole_batch(self, tmp_path):
        script = tmp_path / "two_ranks.py"
        tests = str(Path(__file__).parent)
        script.write_text(TWO_RANKS.format(python=str(PYTHON), tests=tests, folder=str(tmp_path)))
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        saved = torch.load(tmp_path / "two.pt", weights_only=True)
        data, student, teacher = saved["data"], nn.Linear(12, 10).double(), nn.Linear(12, 10).double()
        student.load_state_dict(saved["first"])
        teacher.load_state_dict(saved["teacher"])
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        loss = MCLDLoss(**OPTIONS)
        for images, target in zip(data[0].split(16), data[1].split(16)):
            logits = student(images)
            optimizer.zero_grad()
            (F.cross_entropy(logits, target) + loss(logits, teacher(images).detach(), target)).backward()
            optimizer.step()
        for name, value in student.state_dict().items():
            torch.testing.assert_close(saved["last"][name], value, rtol=1e-9, atol=1e-10)


# Each rank takes every other row, 8 a step; both steps' rows are those of 16 in one process.
TWO_RANKS = """
import os, sys
sys.path += [{python!r}, {tests!r}]
import torchvision_shim
torchvision_shim.install()
import torch, lightning as L
from adapters.lightning_module import Distillation
from mcld_kernels import MCLDLoss

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    student, teacher = (torch.nn.Linear(12, 10).double() for _ in range(2))
    data = torch.randn(32, 12, dtype=torch.float64), torch.randint(10, (32,))
    first = {{name: value.clone() for name, value in student.state_dict().items()}}
    module = Distillation(student, teacher, MCLDLoss(temperature=0.5, weight=3.0),
                          lambda values: torch.optim.SGD(values, lr=0.1))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                        use_distributed_sampler=False, default_root_dir={folder!r})
    own = torch.utils.data.TensorDataset(*(values[int(os.environ.get("LOCAL_RANK", 0)) :: 2] for values in data))
    trainer.fit(module, torch.utils.data.DataLoader(own, 8))
    if trainer.is_global_zero:
        torch.save({{"first": first, "last": student.state_dict(), "teacher": teacher.state_dict(), "data": data}},
                   {folder!r} + "/two.pt")
"""


@needs("transformers", "accelerate")
class TestHuggingFace:
    @pytest.fixture
    def parts(self, tmp_path):
        from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

        config = BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=50,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        models = [BertForSequenceClassification(config) for _ in range(2)]
        data = [{"input_ids": torch.randint(50, (6,)), "labels": int(torch.randint(5, ()))} for _ in range(16)]

        def arguments(**more):
            common = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
            common |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 1}
            return TrainingArguments(str(tmp_path), **{**common, **more})

        return models, data, arguments

    def trainer(self, parts, loss, **more):
        from adapters.hf_trainer import DistillationTrainer

        (student, teacher), data, arguments = parts
        return DistillationTrainer(
            model=student, args=arguments(**more), train_dataset=data, eval_dataset=data, teacher=teacher,
            distill_loss=loss,
        )  # fmt: skip

    def batch(self, data):
        return {name: torch.stack([torch.as_tensor(row[name]) for row in data]) for name in ("input_ids", "labels")}

    def test_accumulated_losses_are_averaged(self, parts):
        """Two micro-batches of 8, and a learning rate of 0: what is logged is the mean of the losses by hand."""
        (student, teacher), data, _ = parts
        expected = []
        for rows in (data[:8], data[8:]):
            batch = self.batch(rows)
            with torch.no_grad():
                outputs, targets = student(**batch), teacher(input_ids=batch["input_ids"]).logits
            expected.append(float(outputs.loss + MCLDLoss(**OPTIONS)(outputs.logits, targets, batch["labels"])))
        options = {"gradient_accumulation_steps": 2, "learning_rate": 0.0, "logging_steps": 1}
        trainer = self.trainer(parts, MCLDLoss(**OPTIONS), train_sampling_strategy="sequential", **options)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(expected) / 2, rel=1e-3)

    def test_mixed_precision_gives_the_loss_two_16_bit_logits_and_the_epoch(self, parts):
        heard = []

        class Recorder(MCLDLoss):
            def forward(self, student, teacher, target):
                heard.append((student.dtype, teacher.dtype))
                return super().forward(student, teacher, target)

        loss = Recorder(**OPTIONS, warmup=4)
        trainer = self.trainer(parts, loss, bf16=True, num_train_epochs=2)
        trainer.train()
        assert heard == [(torch.bfloat16, torch.bfloat16)] * 4
        assert float(loss.effective_weight[2]) == pytest.approx(3 * 1.5 / 4)
        assert not trainer.teacher.training

    def test_a_warm_up_by_steps_goes_on_after_a_resume(self, parts):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
        self.trainer(parts, MCLDLoss(warmup_steps=20), **options).train()
        loss = MCLDLoss(warmup_steps=20)
        trainer = self.trainer(parts, loss, **options)
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
        assert trainer.state.global_step == 4 and int(loss.steps) == 8  # micro-batches

    def test_learned_weights_need_an_optimizer_that_has_them(self, parts):
        from adapters.hf_trainer import DistillationTrainer

        (student, teacher), data, arguments = parts
        loss = MCLDLoss(uncertainty_weighting=True)
        with pytest.raises(ValueError, match="MCLDLoss has parameters.*optimizers="):
            self.trainer(parts, loss)
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
        DistillationTrainer(
            model=student, args=arguments(), train_dataset=data, teacher=teacher, distill_loss=loss,
            optimizers=(optimizer, None),
        ).train()  # fmt: skip
        assert loss.log_variance.abs().min() > 0

    def test_the_evaluation_loss_is_the_models_own(self, parts):
        (student, _), data, _ = parts
        trainer = self.trainer(parts, MCLDLoss(**OPTIONS))
        with torch.no_grad():
            own = float(student.eval()(**self.batch(data)).loss)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-4)


class TestMdistiller:
    """mdistiller is no package on an index; its base class, as published, stands in."""

    @pytest.fixture
    def distiller_dict(self, monkeypatch):
        class Distiller(nn.Module):
            def __init__(self, student, teacher):
                super().__init__()
                self.student, self.teacher = student, teacher

            def train(self, mode=True):
                self.training = mode
                for module in self.children():
                    module.train(mode)
                self.teacher.eval()
                return self

            def forward(self, **kwargs):
                return self.forward_train(**kwargs) if self.training else self.student(kwargs["image"])[0]

        names = ("mdistiller", "mdistiller.distillers", "mdistiller.distillers._base")
        package, distillers, base = (types.ModuleType(name) for name in names)
        distillers.distiller_dict, base.Distiller = {}, Distiller
        for name, module in zip(names, (package, distillers, base)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "adapters.mdistiller_distiller", raising=False)
        import adapters.mdistiller_distiller  # noqa: F401

        return distillers.distiller_dict

    def test_the_sum_of_its_losses_is_cross_entropy_and_the_loss(self, distiller_dict):
        class WithFeatures(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, image):
                return self.model(image), {}

        student, teacher = small_models()
        distiller = distiller_dict["MCLD"](WithFeatures(student), WithFeatures(teacher), None).train()
        images, target = small_data(16).tensors
        by_hand = MCLDLoss(**OPTIONS, warmup=20)
        for epoch in (1, 2):  # mdistiller counts from 1
            by_hand.set_epoch(epoch - 1)
            prediction, losses = distiller(image=images, target=target, epoch=epoch)
            expected = F.cross_entropy(student(images), target) + by_hand(student(images), teacher(images), target)
            torch.testing.assert_close(sum(value.mean() for value in losses.values()), expected)
        assert torch.equal(prediction, student(images)) and not distiller.teacher.training
        assert torch.equal(distiller.eval()(image=images), student(images))
        distiller.loss = MCLDLoss(uncertainty_weighting=True)
        learnable = {id(parameter) for parameter in distiller.get_learnable_parameters()}
        assert learnable == {id(x) for x in (*student.parameters(), distiller.loss.log_variance)}

    def test_the_snippet_of_the_quickstart_runs(self, distiller_dict):
        page = (PYTHON.parent / "docs" / "quickstart.md").read_text()
        code = page.split("## mdistiller")[1].split("```python\n")[1].split("```")[0]
        exec(code, {"MCLDLoss": MCLDLoss})
        distiller = distiller_dict["MCLD"](*small_models())
        assert distiller.loss.temperature == (0.5, 0.5, 0.5) and distiller.loss.warmup == 20

    def test_another_loss_is_one_method(self, distiller_dict):
        class KD(distiller_dict["MCLD"]):
            def make_loss(self, cfg):
                return KDLoss(temperature=cfg["temperature"])

        student, teacher = (lambda image: (image, {}), lambda image: (image.flip(1), {}))
        distiller = KD(nn.Identity(), nn.Identity(), {"temperature": 2.0}).train()
        del distiller.student, distiller.teacher
        distiller.student, distiller.teacher = student, teacher
        logits, target = torch.randn(4, 10), torch.randint(10, (4,))
        _, losses = distiller.forward_train(logits, target, epoch=1)
        torch.testing.assert_close(losses["loss_kd"], KDLoss(temperature=2.0)(logits, logits.flip(1)))


@needs("timm", "lightning", "transformers", "torchdistill")
def test_over_ranks_the_loss_gets_their_group_or_an_error_says_why_not(monkeypatch):
    import torch.distributed as dist
    from adapters import hf_trainer, lightning_module, timm_task, torchdistill_loss

    modules = (hf_trainer, lightning_module, timm_task, torchdistill_loss)
    assert len({inspect.getsource(module.sync_over_ranks) for module in modules}) == 1
    sync_over_ranks = lightning_module.sync_over_ranks
    sync_over_ranks(nn.Identity())  # one process
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    loss = nn.Identity()
    loss.process_group = None
    sync_over_ranks(loss)
    assert loss.process_group is dist.group.WORLD
    with pytest.raises(ValueError, match="Identity has no process_group, so each rank would see its own rows alone"):
        sync_over_ranks(nn.Identity())


def test_an_adapter_takes_every_loss_of_the_package():
    """The one call that the adapters rely on: loss(student, teacher, target)."""
    student, teacher = torch.randn(2, 8, 10)
    target = torch.randint(10, (8,))
    losses = [name for name in mcld_kernels.__all__ if name.endswith("Loss") and name != "InfoNCELoss"]
    assert "MCLDLoss" in losses
    for name in losses:
        assert getattr(mcld_kernels, name)()(student, teacher, target).isfinite(), name
