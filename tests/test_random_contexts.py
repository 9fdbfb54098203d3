"""Random contexts: what they are drawn like, their predictions along a chain, how often they are asked, their file."""

import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kept_answers import BASE, CONCEPT, SHAPE, answer, question
from test_kept_pictures import hostile_bytes
from test_preservation import kept_by, t5
from tiny_run import CONFIG, flags, run, write_dataset, write_dit, write_sample_models

from utils.cli.train import parse_train
from utils.data.cache_files import read_text, text_path
from utils.learning.flow_matching import draw_generator, sigmas_of
from utils.preserve.answers import OldPrompt, RandomContexts
from utils.preserve.answers_file import read_answers, write_answers
from utils.preserve.asking import AskedModel, read_old_prompts
from utils.preserve.old_prompts import OldPrompts, Preservation
from utils.preserve.random_contexts import MOST_TOKENS, DrawnContexts, TokenStatistics, first_texts
from utils.run.state import read_state
from wan.errors import InputError
from wan.loading import load_dit
from wan.model import WanModel

COUNT = 16
FEW = ["a red cat sits", "a cat", "red"]  # so few that they take less room than the contexts
SAMPLES = ("utils.preserve.asking.caption_samples", "utils.preserve.old_prompts.caption_samples")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three runs in a chain, without a list of prompts, in `chain`; what they said in `said.txt`."""
    folder = tmp_path_factory.mktemp("run")
    write_dit(folder / "base.safetensors")
    for name in ("", "new", "other"):
        write_dataset(folder / name, name)
    write_sample_models(folder)
    with patch(SAMPLES[0], return_value=FEW), patch(SAMPLES[1], return_value=FEW):
        said = run(folder, *preserving(folder, "--preserve_random", str(COUNT)))
        said += run(folder, *after(folder, "out", "one", "two", 3, "new"))
        said += run(folder, *after(folder, "out", "two", "three", 4, "other"))
    (folder / "said.txt").write_text("\n".join(said), encoding="utf-8")
    (folder / "out").rename(folder / "chain")
    return folder


@pytest.fixture
def folder(files):
    yield files
    shutil.rmtree(files / "out", ignore_errors=True)


def preserving(folder, *more):
    return (*t5(folder), "--preserve_prompts", *more, "--preserve_levels=2", "--max_train_epochs=1", "--guard=0")


def after(folder, where, earlier, name, ffid, data):
    """The flags of a later run in a chain."""
    dit, answers = (str(folder / where / f"{earlier}{ending}.safetensors") for ending in ("", ".answers"))
    own = ("--dit", dit, "--ffid", str(ffid), "--output_name", name)
    own += ("--dataset_config", str(folder / data / "data.toml"), "--preserve_answers", answers)
    return (*own, *preserving(folder))


def texts(*lengths, width=6):
    draw = torch.Generator().manual_seed(1)
    mixed = torch.randn(width, width, generator=draw)
    return [(torch.randn(length, width, generator=draw) @ mixed + 3).bfloat16() for length in lengths]


def test_contexts_have_the_mean_the_covariance_and_the_lengths_of_the_captions():
    captions = texts(2, 2, 2, 9, 40)
    drawn = list(DrawnContexts(7, TokenStatistics.of(captions), 1000))
    found = torch.cat(drawn).double()
    tokens = torch.cat(captions).double()
    torch.testing.assert_close(found.mean(0), tokens.mean(0), rtol=0.02, atol=0.1)
    covariance = torch.cov(tokens.T, correction=0)
    assert (torch.cov(found.T) - covariance).norm() < 0.06 * covariance.norm()
    lengths = [len(text) for text in drawn]
    assert {length: lengths.count(length) / 1000 for length in lengths} == pytest.approx(
        {2: 0.6, 9: 0.2, 40: 0.2}, abs=0.05
    )


def test_a_context_is_always_the_same_in_bf16_and_no_other_context():
    statistics = TokenStatistics.of(texts(9, 9))
    one, again, other = (
        DrawnContexts(7, statistics, 3),
        DrawnContexts(7, statistics, 2),
        DrawnContexts(8, statistics, 3),
    )
    assert len(one) == 3 and len(list(one)) == 3 and one[1].dtype == torch.bfloat16
    assert torch.equal(one[1], again[1]) and not torch.equal(one[1], one[2]) and not torch.equal(one[1], other[1])


def test_no_more_captions_are_read_than_their_tokens_are_needed():
    read = []

    def cached(length):
        read.append(length)
        return torch.zeros(length, 4)

    half = MOST_TOKENS // 2
    assert [len(text) for text in first_texts(map(cached, (half, half, 1, 9)))] == [half, half]
    assert read == [half, half, 1]
    assert len(first_texts([torch.zeros(MOST_TOKENS + 5, 4)])) == 1 and first_texts([]) == []


def recorded(folder, name):
    return kept_by(folder / f"{name}.answers.safetensors", folder)


def test_a_run_records_its_base_at_contexts_like_all_its_captions(folder):
    first = recorded(folder, "chain/one")
    model, random = load_dit(folder / "base.safetensors", torch.float32), first.random
    for text_SD, one in zip(random.texts, random.kept, strict=True):
        expected = model(one.noisy_CFHW[None].float(), torch.tensor([one.t]), [text_SD])[0]
        torch.testing.assert_close(one.velocity_CFHW, expected.half(), rtol=1e-3, atol=1e-3)
    statistics = random.texts.statistics
    captions = {tuple(text.flatten().tolist()) for text in statistics.tokens_TD.split(list(statistics.lengths))}
    own = {tuple(read_text(text_path(folder / "pics", f"wide{n}")).flatten().tolist()) for n in range(3)}
    assert own < captions and len(statistics.lengths) == len(FEW) + 8 + 1
    assert tuple(first.general[0].text_SD.flatten().tolist()) in captions and first.general[0].text == ""
    assert len({one.shape for one in random.kept}) == 2
    tokens = f"{len(statistics.tokens_TD)} tokens of {len(statistics.lengths)} captions: shipped ones, the run's own"
    assert f"16 random contexts are drawn like the {tokens}" in (folder / "said.txt").read_text(encoding="utf-8")


def test_the_noise_levels_are_spread_evenly_one_for_each_context(folder):
    times = sorted(one.t / 1000 for one in recorded(folder, "chain/one").random.kept)
    timesteps, edges = parse_train(flags(folder)).timesteps, torch.linspace(0, 1, COUNT + 1).double().clamp(1e-9, 1)
    quantiles = sigmas_of(timesteps, edges, (2, 4)).tolist()
    assert all(low <= t <= high for low, t, high in zip(quantiles, times, quantiles[1:], strict=False))
    assert len(set(times)) == COUNT


def test_along_a_chain_without_a_list_they_are_recorded_once_and_never_change(folder):
    one, two, three = (load_file(folder / "chain" / f"{name}.answers.safetensors") for name in ("one", "two", "three"))
    contexts = {key: value for key, value in one.items() if key.startswith("random.")}
    assert len(contexts) == 2 + 2 * COUNT
    for later in (two, three):
        assert all(
            torch.equal(later[key].view(torch.int16), value.view(torch.int16)) for key, value in contexts.items()
        )
        assert len([key for key in later if key.startswith("random.")]) == len(contexts)
    said = (folder / "said.txt").read_text(encoding="utf-8")
    assert "records 18 predictions of the model, for the 1 of 1 listed prompts that have none yet, and at 16" in said
    assert said.count("records 16 predictions of the model, for the 8 of") == 2
    for concepts in (0, 8, 16):
        assert f"preserves the empty prompt, {concepts} prompts of concepts and 16 random contexts, on one" in said


def test_what_is_said_of_the_files_size_holds(folder):
    said = (folder / "said.txt").read_text(encoding="utf-8")
    for name in ("one", "three"):
        told = float(re.search(rf"{name}.answers.safetensors \(up to ([0-9.]+) kB\)", said)[1])
        held = load_file(folder / "chain" / f"{name}.answers.safetensors")
        size = sum(values.nbytes for values in held.values())
        assert size - 100 <= 1000 * told < 1.1 * size + 100  # rounded to 100 bytes


def test_a_file_without_contexts_gets_them_from_the_next_run(folder):
    first = preserving(folder, "--preserve_random", "0")
    assert "random" not in "\n".join(run(folder, *first)) and recorded(folder, "out/one").random is None
    told = "\n".join(run(folder, *after(folder, "out", "one", "two", 3, "new"), "--preserve_random", "3"))
    assert "and at 3 random contexts" in told
    found = recorded(folder, "out/two").random
    assert len(found.texts) == len(found.kept) == 3 and isinstance(found.texts, tuple)  # too few for statistics
    model = load_dit(folder / "out" / "one.safetensors", torch.float32)
    predicted = model(found.kept[0].noisy_CFHW[None].float(), torch.tensor([found.kept[0].t]), [found.texts[0]])[0]
    torch.testing.assert_close(found.kept[0].velocity_CFHW, predicted.half(), rtol=1e-3, atol=1e-3)


def test_another_number_than_that_of_the_file_is_refused_and_none_leaves_them_out(folder):
    third = after(folder, "chain", "two", "three", 4, "other")
    with pytest.raises(InputError, match=r"--preserve_random 5: .*two.answers.safetensors holds 16 random contexts"):
        run(folder, *third, "--preserve_random", "5")
    told = "\n".join(run(folder, *third, "--preserve_random", "0"))
    assert "two.answers.safetensors: its 16 random contexts (--preserve_random 0)" in told
    assert recorded(folder, "out/three").random is None


def test_the_empty_prompt_is_not_preserved_where_captions_are_dropped(folder):
    config, model = parse_train([*flags(folder), *preserving(folder)]).preserve, AskedModel(BASE, CONFIG)
    for dropout, texts_left in ((0.0, [""]), (0.5, [])):
        items = [SimpleNamespace(captions=("x",), dropout=dropout), SimpleNamespace(captions=("y",), dropout=0.0)]
        found = read_old_prompts(config, model, [], CONCEPT, items)
        assert [old.text for old in found.all] == texts_left and found.random_count == 256
    assert found.notes == ("not preserved, because this run trains it: the empty prompt",)


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--blocks_to_swap", "1"), marks=pytest.mark.slow)], ids=["resumed", "swapped"]
)
def test_a_resumed_or_swapped_run_takes_the_same_steps(folder, more):
    common = (*after(folder, "chain", "two", "three", 4, "other"), "--preserve_every", "1", "--mixed_precision", "bf16")
    common += ("--max_train_epochs", "2", "--save_state")
    run(folder, *common, "--save_every_n_steps", "4")
    path, state = folder / "out" / "three.answers.safetensors", folder / "out" / "three-state"
    whole, recorded_bytes = read_state(state), path.read_bytes()
    path.unlink()
    again = ("--overwrite",) if more else ("--resume", str(folder / "out" / "three-step00000004-state"))
    run(folder, *common, *more, *again)
    assert path.read_bytes() == recorded_bytes
    assert all(torch.equal(value, read_state(state).trained[name]) for name, value in whole.trained.items())


@pytest.mark.slow
def test_a_run_with_other_contexts_is_another_run(folder):
    common = (*after(folder, "chain", "two", "three", 4, "other"), "--max_train_epochs", "2")
    run(folder, *common, "--preserve_random", "0", "--save_state", "--save_every_n_epochs", "1")
    resume = ("--resume", str(folder / "out" / "three-000001-state"))
    assert "preserve_random" not in read_state(folder / "out" / "three-000001-state").settings  # as older ones
    with pytest.raises(InputError, match=r"preserve_random 0 \(now 16\)"):
        run(folder, *common, *resume)
    run(folder, *common, "--preserve_random", "0", *resume)


def test_contexts_are_recorded_in_batches_as_large_as_the_runs(folder):
    sizes, forward = [], WanModel.forward

    def counted(model, noisy, *rest):
        if not torch.is_grad_enabled():
            sizes.append(len(noisy))
        return forward(model, noisy, *rest)

    with patch.object(WanModel, "forward", counted):
        run(folder, *preserving(folder, "--preserve_random", "40", "--sample_batch", "2"))
    assert sum(sizes) == 42 and max(sizes) == 2 and sizes.count(1) <= 4  # batches of two train; two sizes of latents


def prompt(text, concept=None):
    return OldPrompt(text, concept, (answer(SHAPE, 1.0),), torch.zeros(3, 48))


RANDOM = RandomContexts(tuple(torch.full((2, 48), float(n)) for n in range(1, 4)), (answer(SHAPE, 2.0),) * 3)
LISTED, OF_CONCEPTS = (prompt("a"), prompt("b")), (prompt("c", CONCEPT),)


def asked(preserved, count, first=0):
    """What `count` asks in a row are for, one by one: r random contexts, g general prompts, c concepts."""
    known = {id(old.text_SD): "g" for old in preserved.general} | {id(old.text_SD): "c" for old in OF_CONCEPTS}
    found = []
    for number in range(first, first + count):
        (drawn,) = preserved.draw([draw_generator(0, number)], "cpu", number)
        found.append(known.get(id(drawn.context[0]), "r"))
    return "".join(found)


@pytest.mark.parametrize(
    ("general", "concepts", "shares"),
    [
        (LISTED, OF_CONCEPTS, {"r": 300, "g": 250, "c": 250}),
        (LISTED, (), {"r": 300, "g": 500, "c": 0}),
        ((), OF_CONCEPTS, {"r": 300, "g": 0, "c": 500}),
        ((prompt(""),), OF_CONCEPTS, {"r": 300, "g": 100, "c": 400}),
        ((prompt(""),), (), {"r": 700, "g": 100, "c": 0}),
        ((*LISTED, prompt("")), OF_CONCEPTS, {"r": 300, "g": 250, "c": 250}),
        ((), (), {"r": 800, "g": 0, "c": 0}),
    ],
)
def test_the_share_of_what_is_asked_is_exact(general, concepts, shares):
    found = asked(Preservation(general, concepts, 1, 1.0, 10**9, RANDOM), 800)
    assert {found[start : start + 8].count("r") for start in range(0, 800, 8)} == {shares["r"] // 100}
    split = general[:1] == LISTED[:1] and concepts  # a chance decides between them, as without random contexts
    assert {kind: found.count(kind) for kind in "rgc"} == pytest.approx(shares, abs=40 if split else 0)


def test_what_is_asked_is_the_same_in_batches_of_any_size_and_on_every_fourth_step():
    preserved = Preservation(LISTED, OF_CONCEPTS, 1, 1.0, 10**9, RANDOM)
    generators = [draw_generator(0, number) for number in range(16)]
    (drawn,) = preserved.draw(generators, "cpu", 0)
    singly = [preserved.draw([draw_generator(0, number)], "cpu", number)[0] for number in range(16)]
    assert all(
        torch.equal(drawn.context[n], one.context[0]) and drawn.t_B[n] == one.t_B[0] for n, one in enumerate(singly)
    )
    every_fourth = "".join(asked(preserved, 1, first) for first in range(3, 6400, 4))
    assert every_fourth.count("r") / 1600 == pytest.approx(3 / 8, abs=0.03)


def test_every_context_is_asked():
    preserved = Preservation((), (), 1, 1.0, 10**9, RANDOM)
    (drawn,) = preserved.draw([draw_generator(0, number) for number in range(300)], "cpu")
    counts = [sum(text[0, 0].item() == n for text in drawn.context) for n in (1, 2, 3)]
    assert sum(counts) == 300 and min(counts) > 70


def written(path, stored=False):
    """A file with a prompt and three random contexts: whole, or what they are drawn like."""
    tokens = TokenStatistics.of(texts(2, width=48) if not stored else texts(8, 8, 8, width=48))
    contexts = RandomContexts(DrawnContexts(2**64 - 1, tokens, 3), ())
    own, text_SD = answer(SHAPE), torch.ones(3, 48)
    rows = [(OldPrompt("a cat", text_SD=text_SD), [question(1.0)])]
    write_answers(path, BASE, "run", rows, iter([own] * 4), (contexts, [question(t) for t in (2.0, 3.0, 4.0)]))
    return contexts


def opened(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@pytest.mark.parametrize("stored", [False, True], ids=["as statistics", "whole"])
def test_the_smaller_of_contexts_and_statistics_is_written_and_read_again(tmp_path, stored):
    contexts = written(tmp_path / "a.safetensors", stored)
    tensors, metadata = opened(tmp_path / "a.safetensors")
    assert json.loads(metadata["wan_answers"])["version"] == 3
    assert {key for key in tensors if key.startswith("random.") and tensors[key].dim() == 2} == (
        {f"random.{n}.text" for n in range(3)} if stored else {"random.tokens", "random.0.text"}
    )
    read = read_answers(tmp_path / "a.safetensors", BASE, CONFIG)
    assert [one.t for one in read.random.kept] == [2.0, 3.0, 4.0] and [old.text for old in read.prompts] == ["a cat"]
    assert all(torch.equal(one, again) for one, again in zip(contexts.texts, read.random.texts, strict=True))
    again = [(old, ()) for old in read.prompts]
    write_answers(tmp_path / "b.safetensors", BASE, "run", again, iter(()), (read.random, ()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("stored", [False, True], ids=["as statistics", "whole"])
def test_the_digest_tells_contexts_apart(tmp_path, stored):
    path, digests = tmp_path / "a.safetensors", set()
    text = "random.1.text" if stored else "random.tokens"
    for key in (None, "random.1.velocity", "random.2.noisy", text):
        written(path, stored)
        tensors, metadata = opened(path)
        if key:
            tensors[key][-1] = 0.5
        save_file(tensors, path, metadata)
        with patch("utils.preserve.answers_file._check_drawn_alike"):
            digests.add(OldPrompts(random=read_answers(path, BASE, CONFIG).random).digest)
    assert len(digests | {OldPrompts().digest, OldPrompts(new_random=3).digest, OldPrompts(new_random=4).digest}) == 7


def tensors(**changes):
    """Other tensors in the file: None takes one out."""

    def change(held, told):
        held |= {key.replace("_", "."): value for key, value in changes.items()}
        for key in [key for key, value in held.items() if value is None]:
            del held[key]

    return change


def listed(**changes):
    return lambda held, told: told["random"].update(changes)


def without(key):
    return lambda held, told: told["random"].pop(key)


PARTS = ("noisy", "velocity")
DAMAGED, OTHER, NOT_DRAWN = "is damaged: its list", "another base model", "cannot be drawn again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensors(random_tokens=None), DAMAGED),
        (tensors(random_0_text=None), DAMAGED),
        (tensors(random_2_noisy=None), DAMAGED),
        (tensors(random_tokens=torch.zeros(2, 48)), DAMAGED),
        (tensors(random_tokens=torch.zeros(3, 48).bfloat16()), DAMAGED),
        (tensors(random_tokens=torch.zeros(2, 40).bfloat16()), OTHER),
        (tensors(random_tokens=torch.ones(2, 48).bfloat16()), NOT_DRAWN),
        (tensors(random_tokens=torch.full((2, 48), torch.nan).bfloat16()), "NaN or infinite values in random.tokens"),
        (tensors(random_0_text=torch.ones(2, 48).bfloat16()), NOT_DRAWN),
        (tensors(random_0_text=torch.ones(1, 48).bfloat16()), NOT_DRAWN),
        (tensors(random_1_velocity=torch.zeros(16, 1, 4, 2).half()), DAMAGED),
        (tensors(**{f"random_{n}_{part}": torch.zeros(3, 1, 2, 4).half() for n in range(3) for part in PARTS}), OTHER),
        (listed(seed=5), NOT_DRAWN),
        (listed(seed=-1), DAMAGED),
        (listed(seed=2**64), DAMAGED),
        (listed(seed=True), DAMAGED),
        (listed(seed="5"), DAMAGED),
        (listed(lengths=[]), DAMAGED),
        (listed(lengths=[1]), DAMAGED),
        (listed(lengths=[0, 2]), DAMAGED),
        (listed(lengths=[-1, 3]), DAMAGED),
        (listed(lengths=[2.0]), DAMAGED),
        (listed(lengths=2), DAMAGED),
        (listed(lengths=[1, 1]), NOT_DRAWN),
        (listed(timesteps=[]), DAMAGED),
        (listed(timesteps=[1.0] * 4), DAMAGED),
        (listed(timesteps=[1.0, 2.0, 1001.0]), DAMAGED),
        (listed(pictures=[None]), DAMAGED),
        (without("lengths"), DAMAGED),
        (without("seed"), DAMAGED),
        (without("starts_clean"), DAMAGED),
        (lambda held, told: told.pop("random"), DAMAGED),
        (lambda held, told: told.update(random=[]), DAMAGED),
        (lambda held, told: told.update(random="x"), DAMAGED),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    written(path)
    held, metadata = opened(path)
    told = json.loads(metadata["wan_answers"])
    change(held, told)
    save_file(held, path, {"wan_answers": json.dumps(told)})
    with pytest.raises(InputError, match=message):
        read_answers(path, BASE, CONFIG)


@pytest.mark.parametrize("stored", [False, True], ids=["as statistics", "whole"])
@pytest.mark.parametrize("examples", [20, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_as_it_is_or_refused_in_one_line(tmp_path, examples, stored):
    path, refused = tmp_path / "a.safetensors", []
    written(path, stored)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hostile_bytes(path.read_bytes()))
    def attempt(content):
        (tmp_path / "b.safetensors").write_bytes(content)
        try:
            random = read_answers(tmp_path / "b.safetensors", BASE, CONFIG).random
            assert random is None or all(text_SD.isfinite().all() for text_SD in random.texts)
        except InputError as error:
            refused.append(str(error))

    attempt()
    assert refused and not any("\n" in message or len(message) > 2000 for message in refused)


def test_tokens_so_large_that_what_is_drawn_is_not_finite_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    written(path)
    held, metadata = opened(path)
    held["random.tokens"] = torch.tensor([[3e38], [-3e38]]).expand(2, 48).bfloat16().contiguous()
    save_file(held, path, metadata)
    with pytest.raises(InputError, match=NOT_DRAWN):
        read_answers(path, BASE, CONFIG)


def test_more_contexts_than_a_run_would_record_and_longer_ones_than_it_reads_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    written(path)
    with patch("utils.preserve.answers_file.MOST_CONTEXTS", 2), pytest.raises(InputError, match=DAMAGED):
        read_answers(path, BASE, CONFIG)
    long = RandomContexts(DrawnContexts(1, TokenStatistics.of(texts(9, width=48)), 3), (answer(SHAPE),) * 3)
    write_answers(path, BASE, "run", [], iter(()), (long, ()))
    with pytest.raises(InputError, match=OTHER):
        read_answers(path, BASE, CONFIG)
