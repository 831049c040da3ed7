"""The parts of the trainer: settings, order of images, augmentation, losses, models, one step."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from trainer_cases import ROOT, SMALL, image, merged, yaml

import mcld_kernels
from bench.harness import programs

import train  # isort: skip
from trainer import assembly, config, data, losses, models, ranks, settings, sources, step  # isort: skip
from trainer.faults import EXIT_CODES, ConfigFault, Exit  # isort: skip

RECIPES = sorted((ROOT / "python" / "recipes").glob("*.yaml"))
CPU = torch.device("cpu")


def foreign(classes, name):
    """A checkpoint of the trainer without weights."""
    state = {"model": {}, "ema": None, "average_is_better": False}
    return {"kind": models.KIND, "classes": classes, "model_name": name, **state}


def small(**changes):
    return settings.build(merged(SMALL, changes), "here")


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epoch: 3", "unknown key epoch; did you mean epochs? known are seed, epochs"),
            ("data: {sorce: folder}", "unknown key data.sorce; did you mean data.source? known here are source, root"),
            ("batch: many", "batch must be a whole number; got 'many'"),
            ("batch: 2.5", "batch must be a whole number; got 2.5"),
            ("batch: true", "batch must be a whole number; got True"),
            ("batch: 0", "batch must be at least 1; got 0"),
            ("optimizer: {rate: 0}", "optimizer.rate must be more than 0; got 0"),
            ("optimizer: {rate: .inf}", "optimizer.rate must be finite"),
            ("augment: {flip: 2}", "augment.flip must be at most 1; got 2"),
            ("ema: {warmup: 1}", "ema.warmup must be true or false; got 1"),
            ("data: {source: floppy}", "data.source must be one of synthetic, digits, folder, webdataset, cifar100"),
            ("data: 3", "data must be a section of keys and values; got 3"),
            ("loss: {options: {temperature: {a: 1}}}", "loss.options.temperature must be a number, a text"),
            ("student: {name: ''}", "student.name is missing"),
            ("teacher: {name: ''}", "teacher.name is missing, and loss.name=kd needs a teacher"),
            ("data: {source: folder}", "data.root is missing"),
            ("augment: {scale: [1.0, 0.5]}", "augment.scale must be two numbers, 0 < low <= high"),
            ("augment: {mean: [0.5, 0.5]}", "augment.mean must have one number, or 3 for data.channels=3; got 2"),
            ("data: {channels: 1}", "augment.mean must have one number for data.channels=1; got 3"),
            ("teacher: {cache: true}\naugment: {mixup: 0.5}", "teacher.cache keeps logits by image"),
            ("teacher: {cache: true}\ndata: {source: digits}", "teacher.cache needs images that come again"),
            ("precision: {dtype: float64, amp: bfloat16}", "leaves nothing to precision.amp"),
            ("- 1", "must hold keys and values; got list"),
            ("a: [", "is not YAML"),
            ("epochs: 3\nepochs: 4", "the key 'epochs' stands twice"),
            ("base: nowhere.yaml", "cannot read the configuration"),
            ("base: a.yaml", "names itself as its base"),
        ],
    )
    def test_what_does_not_fit_is_told_by_its_name(self, text, message, tmp_path):
        path = tmp_path / "a.yaml"
        own = yaml.safe_load(text) if not re.search("- 1|\\[$|3\nepochs|base", text) else None
        path.write_text(text if own is None else yaml.safe_dump(merged(SMALL, own)))
        with pytest.raises(ConfigFault, match=re.escape(message)):
            settings.load(path)

    def test_overrides_take_precedence_and_are_checked(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(SMALL))
        made = settings.load(path, ["optimizer.rate=1e-3", "steps=5", "data.root=~"][:2], ["temperature=2"])
        assert made.optimizer.rate == 1e-3 and made.steps == 5 and made.loss.options == {"temperature": 2}
        for text, message in (
            ("rate", "--set takes key=value; got 'rate'"),
            ("=3", "--set takes key=value"),
            ("optimizer.speed=3", "unknown key optimizer.speed"),
            ("batch=[", "is not a YAML value"),
        ):
            with pytest.raises(ConfigFault, match=re.escape(message)):
                settings.load(path, [text])

    def test_what_is_written_is_read_back(self):
        made = small(loss={"options": {"temperature": [0.1, 0.2, 0.3], "backend": "torch"}}, steps=4)
        assert settings.build(yaml.safe_load(settings.text(made)), "here") == made
        assert not list(settings.differences(settings.tree(made), settings.tree(made)))
        other = small(epochs=9, loss={"name": "ce"})
        keys = [key for key, _, _ in settings.differences(settings.tree(made), settings.tree(other))]
        assert keys == ["epochs", "steps", "loss.name", "loss.options.temperature", "loss.options.backend"]

    def test_the_reference_in_the_docs_is_that_of_the_code(self):
        page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
        begin, end = "<!-- begin: settings -->\n", "<!-- end: settings -->"
        assert page[page.index(begin) + len(begin) : page.index(end)].strip() == settings.reference().strip()

    def test_the_docs_and_the_help_have_every_exit_code(self):
        page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
        for code in Exit:
            assert re.search(rf"\b{int(code)}\b", EXIT_CODES) and f"| {int(code)} |" in page
        for code in programs.Exit:
            assert Exit[code.name] == code  # the programs' codes mean the same here

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_a_recipe_is_read_and_says_its_sources(self, path):
        text = path.read_text()
        made = settings.load(path, ["data.root=/data"])
        assert "Not run here" in text and re.search(r"arXiv \d{4}\.\d{5}", text)
        with torch.device("meta"):
            models.create(made.student, "student", classes=made.data.classes, channels=3)
        losses.Distillation(made.loss, smoothing=made.augment.smoothing)
        if "-4096" in path.name or "-16384" in path.name:
            assert str(made.batch) in path.name and re.search("[Ll]inear|[Ss]quare[- ]root", text)
            assert made.optimizer.scaling in ("linear", "sqrt") and made.schedule.warmup_epochs >= 5

    @pytest.mark.parametrize(
        ("recipe", "rate"),
        [("imagenet-r34-r18", 0.2), ("imagenet-r34-r18-4096", 1.6), ("imagenet-r34-r18-16384", 0.005 * 8**0.5),
         ("imagenet-vit", 1e-3), ("imagenet-vit-4096", 4e-3), ("imagenet-vit-16384", 0.004 * 8**0.5),
         ("cifar100-resnet32x4-resnet8x4", 0.05), ("cifar100-resnet32x4-resnet8x4-4096", 0.4)],
    )  # fmt: skip
    def test_the_rate_of_a_recipe_is_scaled_as_its_text_says(self, recipe, rate):
        changes = ["data.root=/data", "student.name=tiny-cnn", "student.options={}", "data.image_size=8"]
        changes += ["loss.name=ce", "loss.options={}"]
        made = settings.load(ROOT / "python" / "recipes" / f"{recipe}.yaml", changes)
        parts = assembly.Parts(made, ranks.Ranks(made), tuple(map(str, range(made.data.classes))), 100)
        assert parts.rate == pytest.approx(rate)


class TestOrder:
    @pytest.fixture
    def source(self):
        return sources.Synthetic(50, 4, 3, 8)

    def order(self, source, rank=0, size=1, accumulate=1, seed=0, batch=12):
        return data.TrainingOrder(source, batch=batch, accumulate=accumulate, rank=rank, size=size, seed=seed)

    def test_ranks_and_micro_batches_divide_each_global_batch(self, source):
        whole = list(self.order(source))
        assert len(whole) == 4 and len({index for keys in whole for _, index in keys}) == 48
        for size, accumulate in ((2, 1), (1, 3), (3, 2)):
            parts = [list(self.order(source, rank, size, accumulate)) for rank in range(size)]
            for number, keys in enumerate(whole):
                micros = [parts[rank][number * accumulate + part] for part in range(accumulate) for rank in range(size)]
                assert [key for micro in micros for key in micro] == keys

    def test_seed_and_epoch_fix_it_and_it_begins_where_it_is_told(self, source):
        order, again, other = self.order(source), self.order(source), self.order(source, seed=1)
        assert list(order) == list(again) != list(other)
        order.first = 2
        assert list(order) == list(again)[2:] and len(order) == 2
        again.epoch = 1
        assert [[i for _, i in keys] for keys in again][2:] != [[i for _, i in keys] for keys in order]
        assert {epoch for keys in again for epoch, _ in keys} == {1}

    def test_a_batch_that_cannot_be_divided_is_told(self, source):
        with pytest.raises(ConfigFault, match=r"batch=12 cannot be divided into 5 ranks x 1 micro-batches"):
            self.order(source, size=5)
        with pytest.raises(ConfigFault, match="batch=64 is more than the 50 training images"):
            self.order(source, batch=64)

    def test_shards_are_read_in_turn_within_a_window(self):
        class Sharded(sources.Synthetic):
            blocks = np.arange(0, 400, 10)  # 40 shards of 10

        order = self.order(Sharded(400, 4, 3, 8)).order(0)
        assert sorted(order) == list(range(400))
        for at in range(0, 400, 160):
            assert len({index // 10 for index in order[at : at + 160]}) == (16 if at < 320 else 8)

    def test_validation_sees_every_image_once_and_ranks_run_as_many_batches(self):
        source = sources.Synthetic(23, 4, 3, 8)
        ranks_ = [list(data.ValidationOrder(source, batch=4, rank=rank, size=3)) for rank in range(3)]
        assert len({len(batches) for batches in ranks_}) == 1
        seen = [index for batches in ranks_ for keys in batches for _, index in keys if index != data.PADDING]
        assert sorted(seen) == list(range(23))


class TestAugmentation:
    def samples(self, seed=0, **augment):
        class Images(sources.Synthetic):
            def read(self, index):
                return image(index), index % 4

        made = small(seed=seed, augment={"auto_augment": "rand-m9", "erasing": 0.5, "color_jitter": 0.4, **augment})
        samples = data.Samples(Images(8, 4, 3, 8), made, training=True)
        samples.transform = data.transform(made.augment, made.data, True)
        return samples

    def test_it_is_a_function_of_seed_epoch_and_index(self):
        samples, other = self.samples(), self.samples(seed=1)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = samples[0, 3][0]
        assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
        samples[0, 4]
        assert torch.equal(samples[0, 3][0], first)
        assert not torch.equal(samples[1, 3][0], first) and not torch.equal(other[0, 3][0], first)

    def test_the_largest_level_of_every_operation_is_an_image(self):
        from timm.data import auto_augment

        for name in auto_augment.NAME_TO_OP:
            operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=10)
            assert np.asarray(operation(image(3))).shape == np.asarray(image(3)).shape, name

    def test_an_augmentation_that_fails_ends_the_run_and_is_no_faulty_image(self):
        samples = self.samples()

        def fails(image):
            raise ValueError("no such crop")

        samples.transform = fails
        _, label, _, faults, fatal = samples[0, 3]
        assert label == data.PADDING and not faults
        assert fatal == "the augmentation of image 3 fails: ValueError: no such crop"

    def test_a_period_brings_the_same_crops_again(self):
        samples = self.samples(period=2)
        images = [samples[epoch, 3][0] for epoch in range(4)]
        assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
        assert not torch.equal(images[0], images[1])

    def test_mixed_labels_are_soft_and_a_place_fixes_them(self):
        mix = data.Mix(small(augment={"mixup": 0.4, "cutmix": 1.0}), 4, 8)
        images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
        first, again, other = (
            mix(images.clone(), labels, *place) for place in ((0, 1, 0, 0), (0, 1, 0, 0), (0, 2, 0, 0))
        )
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[1], other[1])
        assert first[1].shape == (8, 4)
        torch.testing.assert_close(first[1].sum(1), torch.ones(8))
        with pytest.raises(ConfigFault, match="must be even; got 7"):
            data.Mix(small(augment={"mixup": 0.4}), 4, 7)


class TestLosses:
    def test_the_losses_of_the_package_are_known_by_name(self):
        known = losses.registry()
        assert {"kd", "mcld", "dkd"} <= known.keys() and known["mcld"] is mcld_kernels.MCLDLoss
        for name in mcld_kernels.__all__:
            assert not name.endswith("Loss") or getattr(mcld_kernels, name) in known.values()

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"name": "magic"}, "loss.name=magic is unknown; there are ce,"),
            ({"name": "kd", "options": {"temprature": 2}}, "kd has no temprature; it has temperature, backend"),
            ({"name": "mcld", "options": {"temperature": -1}}, "loss.options of mcld: temperature"),
            ({"name": "ce", "options": {"temperature": 1}}, "ce has none; got temperature"),
        ],
    )
    def test_an_unknown_name_or_option_is_told(self, section, message):
        with pytest.raises(ConfigFault, match=re.escape(message)):
            losses.Distillation(config.Loss(**section))

    @pytest.mark.parametrize("name", sorted(losses.registry()))
    def test_every_loss_trains_in_one_batch_and_in_micro_batches(self, name):
        grads = []
        for parts in (1, 2):
            torch.manual_seed(2)
            student, teacher = models.tiny_cnn(4, 3).double(), models.tiny_cnn(4, 3).double().eval()
            objective = losses.Distillation(config.Loss(name=name, gradient_norms=1))
            objective.set_epoch(1)
            optimizer = torch.optim.SGD([*student.parameters(), *objective.parameters()], lr=0.1)
            made = step.Step(student, objective, optimizer, device=CPU, teacher=teacher)
            images, target = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 4
            micros = [step.Micro(images=x, target=y) for x, y in zip(images.chunk(parts), target.chunk(parts))]
            outcome = made(micros, norms=True)
            assert outcome.parts.keys() <= objective.weights().keys() and outcome.norms
            grads.append([x.grad for x in student.parameters()])
        for one, two in zip(*grads):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", ["kd", "dkd", "mcld"])
    def test_the_loss_is_the_weighted_sum_of_its_parts(self, name):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 12, 4, dtype=torch.float64)
        target = torch.arange(12) % 4
        section = config.Loss(name=name, weight=0.7, cross_entropy=0.3, warmup_epochs=4)
        loss = losses.Distillation(section, smoothing=0.1)
        loss.set_epoch(1)
        value, parts = loss(student, teacher, target)
        alone = losses.registry()[name]()(student, teacher, target)
        cross = nn.functional.cross_entropy(student, target, label_smoothing=0.1)
        torch.testing.assert_close(value, 0.3 * cross + 0.7 * 0.25 * alone)
        weights = loss.weights()
        assert weights["cross-entropy"] == 0.3 and weights[name] == pytest.approx(0.175)
        if name == "mcld":
            total = sum(weights[part] * parts[part] for part in ("cross-entropy", "instance", "sample", "category"))
            torch.testing.assert_close(value, total)

    @pytest.mark.parametrize("name", ["kd", "mcld"])
    def test_gradient_norms_are_those_of_the_weighted_parts(self, name):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 12, 4, dtype=torch.float64)
        target = torch.arange(12) % 4
        options = {"weight": [1.0, 2.0, 3.0], "warmup": 2} if name == "mcld" else {}
        loss = losses.Distillation(config.Loss(name=name, weight=0.5, gradient_norms=1, options=options))
        loss.set_epoch(1)
        norms = loss.gradient_norms(student, teacher, target)
        parts = {"kd": ["cross-entropy", "kd"], "mcld": ["cross-entropy", "instance", "sample", "category"]}[name]
        assert list(norms) == parts
        leaf = student.clone().requires_grad_()
        nn.functional.cross_entropy(leaf, target).backward()
        torch.testing.assert_close(norms["cross-entropy"].double(), leaf.grad.norm(), rtol=1e-6, atol=0)
        if name == "mcld":
            for place, (part, weight) in enumerate(zip(parts[1:], (0.5, 1.0, 0.75))):
                leaf = student.clone().requires_grad_()
                one = [float(place == i) for i in range(3)]
                mcld_kernels.mcld_loss(leaf, teacher, target, weight=one, backend="reference").backward()
                torch.testing.assert_close(norms[part].double(), weight * leaf.grad.norm(), rtol=1e-6, atol=0)

    def test_soft_labels_reach_the_losses_that_take_them_and_the_others_refuse(self):
        student, teacher = torch.randn(2, 8, 4)
        soft = torch.softmax(torch.randn(8, 4), 1)
        for section in (config.Loss(name="kd"), config.Loss(name="mcld", options={"weight": [1.0, 0.0, 1.0]})):
            loss = losses.Distillation(section)
            loss.check(CPU, soft=True)
            assert loss(student, teacher, soft)[0].isfinite()
        with pytest.raises(ConfigFault, match="dkd with these options refuses soft labels, as mixup and cutmix make"):
            losses.Distillation(config.Loss(name="dkd")).check(CPU, soft=True)

    def test_mixed_labels_reach_mcld_as_they_are(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 8, 4, dtype=torch.float64)
        soft = torch.softmax(torch.randn(8, 4), 1)
        loss = losses.Distillation(config.Loss(name="mcld", cross_entropy=0.0), smoothing=0.1)
        loss.check(CPU, soft=True)
        torch.testing.assert_close(
            loss(student, teacher, soft)[0], mcld_kernels.mcld_loss(student, teacher, soft, backend="reference")
        )

    def test_a_queue_adds_the_teacher_rows_of_earlier_steps(self):
        torch.manual_seed(0)
        student, teacher, before = torch.randn(3, 8, 4, dtype=torch.float64)
        target = torch.arange(8) % 4
        section = config.Loss(name="mcld", queue=8, cross_entropy=0.0, gradient_norms=1)
        loss = losses.Distillation(section, classes=4, dtype=torch.float64)
        loss.check(CPU, soft=False)
        first = loss(student, teacher, target)[0]
        torch.testing.assert_close(first, mcld_kernels.mcld_loss(student, teacher, target))
        loss.enqueue(before, target)
        wanted = mcld_kernels.mcld_loss(student, teacher, target, candidates=before, candidate_target=target)
        torch.testing.assert_close(loss(student, teacher, target)[0], wanted)
        assert wanted > first and loss.gradient_norms(student, teacher, target).keys() >= {"instance", "category"}
        with pytest.raises(ConfigFault, match="loss.queue: kd takes no further candidates"):
            losses.Distillation(config.Loss(name="kd", queue=8), classes=4)


class TestModels:
    @pytest.mark.parametrize(
        ("name", "parameters"), [("resnet8x4", 1_233_540), ("resnet32x4", 7_433_860), ("resnet20", 278_324)]
    )
    def test_the_networks_for_cifar_have_the_published_numbers_of_parameters(self, name, parameters):
        with torch.device("meta"):
            made = models.create(config.Model(name=name), "student", classes=100, channels=3)
            assert made(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
        assert sum(x.numel() for x in made.parameters()) == parameters

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"student": {"name": "resnet1800"}}, "student.name=resnet1800 is neither a model of timm"),
            ({"student": {"name": "resnet8x4", "pretrained": True}}, "resnet8x4 is built in and has no weights"),
            ({"student": {"options": {"depth": 3}}}, "student.options: "),
            ({"teacher": {"allow_untrained": False}}, "the teacher has no weights"),
            ({"teacher": {"checkpoint": "nowhere.pt"}}, "nowhere.pt cannot be read: No such file"),
            ({"student": {"name": "vit_tiny_patch16_224"}}, "student cannot take images (2, 3, 8, 8)"),
            ({"optimizer": {"name": "magic"}}, "optimizer.name=magic is unknown to timm"),
            ({"optimizer": {"options": {"speed": 3}}}, "optimizer: sgd refuses its options"),
            ({"schedule": {"warmup_epochs": 2}}, "schedule.warmup_epochs=2 must be less than epochs=2"),
        ],
    )
    def test_what_does_not_fit_is_told_before_any_step(self, changes, message):
        made = small(**changes)
        with pytest.raises(ConfigFault, match=re.escape(message)):
            assembly.Parts(made, ranks.Ranks(made), ("a", "b", "c", "d"), 5)

    @pytest.mark.parametrize(
        ("saved", "message"),
        [
            (lambda: models.tiny_cnn(7, 3).state_dict(), "it knows 7 classes, and the data has 4"),
            (lambda: models.tiny_bn(4, 3).state_dict(), "is not of a tiny-cnn"),
            (lambda: {"epoch": 3}, "holds no weights"),
            (lambda: b"half a file", "is cut off, or holds more than weights"),
            (lambda: foreign(["a", "b", "d", "c"], "tiny-cnn"), "its class 2 is 'd', that of the data 'c'"),
            (lambda: foreign(["a"], "tiny-cnn"),
             "its 1 classes are not the 4 of the data"),
            (lambda: foreign([], "resnet18"),
             "holds a resnet18; teacher.name=tiny-cnn"),
        ],
    )  # fmt: skip
    def test_weights_of_another_teacher_are_told(self, saved, message, tmp_path):
        path, content = tmp_path / "a.pt", saved()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        made = small(teacher={"checkpoint": str(path)})
        with pytest.raises(ConfigFault, match=re.escape(message)):
            models.teacher(made, ("a", "b", "c", "d"), CPU)

    def test_weights_under_other_names_are_read(self, tmp_path):
        own = models.tiny_cnn(4, 3)
        state = {f"module.{name}": value for name, value in own.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
        made = small(
            teacher={"checkpoint": str(tmp_path / "a.pt"), "dtype": "bfloat16"}, precision={"channels_last": True}
        )
        teacher = models.teacher(made, ("a", "b", "c", "d"), CPU)
        assert not teacher.training and all(not x.requires_grad for x in teacher.parameters())
        assert {x.dtype for x in teacher.parameters()} == {torch.bfloat16}
        assert teacher[0].weight.is_contiguous(memory_format=torch.channels_last)


class TestAStep:
    def make(self, loss="mcld", accumulate=1, model=None, scaler=None, **more):
        torch.manual_seed(0)
        student = model or models.tiny_cnn(4, 3, dropout=0.3)
        objective = losses.Distillation(config.Loss(name=loss))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        teacher = models.tiny_cnn(4, 3).eval().requires_grad_(False)
        return step.Step(student, objective, optimizer, device=CPU, teacher=teacher, scaler=scaler, **more)

    def micros(self, parts, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        images, target = torch.randn(12, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(12) % 4
        return [step.Micro(images=x, target=y) for x, y in zip(images.chunk(parts), target.chunk(parts))]

    @pytest.mark.parametrize("loss", ["kd", "mcld"])
    def test_accumulated_micro_batches_have_the_gradient_of_one_batch(self, loss):
        grads = []
        for parts in (1, 3):
            torch.manual_seed(2)
            made = self.make(loss, model=models.tiny_cnn(4, 3).double())
            made.teacher.double()
            outcome = made(self.micros(parts, torch.float64))
            grads.append([x.grad.clone() for x in made.student.parameters()] + [outcome.loss])
            assert len(outcome.teacher) == parts
        for one, three in zip(*grads):
            torch.testing.assert_close(three, one, rtol=1e-10, atol=1e-12)

    def test_both_passes_of_an_accumulated_contrast_draw_the_same_dropout(self):
        """The gradient is that of the loss of the logits seen: compared with a plain backward over both graphs."""
        made = self.make()
        micros = self.micros(2)
        torch.manual_seed(5)
        outcome = made(micros)
        grads = [x.grad.clone() for x in made.student.parameters()]
        again = self.make()
        torch.manual_seed(5)
        logits = torch.cat([again.student(micro.images) for micro in micros])
        teacher = torch.cat([again.teacher(micro.images) for micro in micros])
        loss, _ = again.objective(logits, teacher, torch.cat([micro.target for micro in micros]))
        loss.backward()
        torch.testing.assert_close(outcome.loss, loss.detach())
        for grad, parameter in zip(grads, again.student.parameters()):
            torch.testing.assert_close(grad, parameter.grad)

    def test_batch_norm_statistics_move_once_a_micro_batch(self):
        made, other = (self.make(model=models.tiny_bn(4, 3)) for _ in range(2))
        other.student.load_state_dict(made.student.state_dict())
        made(self.micros(2))
        for micro in self.micros(2):
            other.student(micro.images)
        for a, b in zip(made.student.buffers(), other.student.buffers()):
            torch.testing.assert_close(a, b)

    def test_a_scaler_changes_nothing_but_the_scale(self):
        plain, scaled = self.make(), self.make(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
        for made in (plain, scaled):
            torch.manual_seed(3)
            made(self.micros(1))
        for a, b in zip(plain.student.parameters(), scaled.student.parameters()):
            torch.testing.assert_close(a, b)

    def test_the_gradient_is_clipped(self):
        made = self.make(clip_norm=1e-3)
        made(self.micros(1))
        norm = torch.stack([x.grad.norm() for x in made.student.parameters()]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)

    def test_the_time_of_each_part_is_measured(self):
        made = self.make()
        made(self.micros(2))
        seconds = made.watch.read()
        assert seconds.keys() == {"teacher", "student", "loss", "optimizer"} and all(x > 0 for x in seconds.values())
        assert not made.watch.read()


def test_the_experiment_of_digits_stays_the_default_and_needs_no_framework():
    """Without --config nothing of timm or torchvision is imported."""
    code = (
        "import sys; sys.path.insert(0, 'python'); import train\n"
        "try: train.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'timm', 'torchvision', 'webdataset', 'torchmetrics', 'yaml', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--seeds" in done.stdout and "--config" in done.stdout


def test_the_help_of_the_trainer_has_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--config", "x", "--help"])
    assert end.value.code == 0
    assert "75 stopped by SIGTERM" in " ".join(capsys.readouterr().out.split())
