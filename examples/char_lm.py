"""A character language model, trained with nn.LSTMCell, lstmfused.LSTMCell and lstmfused.LSTM.

The three runs start from one seed and differ in nothing but the class of the recurrent module, so
their losses agree. The cell is called once for each character, the layer once for all of a window.
The state is (batch, units): the weights fix the units, each call brings its own batch. Here that is
--batch in training, fewer in the last step of an epoch, and 1 when the model writes text.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lstmfused

# Correct float32 cells differ in their last bits, and training amplifies that from step to
# step, as it would between two machines. So the tolerance holds where rounding has not yet grown:
# in the first steps, and for one set of trained weights in all of them. Rounding stays near 1e-6
# there; a forget gate that is off by 1e-3 exceeds the tolerance.
CHECKED_STEPS = 10
TOLERANCE = 1e-4  # nats per character

State = tuple[Tensor, Tensor]  # hidden and cell, each (B, H), of the layer (1, B, H)
Recurrent = type[nn.LSTMCell] | type[nn.LSTM]
KINDS: dict[str, Recurrent] = {
    "nn.LSTMCell": nn.LSTMCell,
    "lstmfused.LSTMCell": lstmfused.LSTMCell,
    "lstmfused.LSTM": lstmfused.LSTM,
}


class CharModel(nn.Module):
    """Predicts the next character. B batch, T time, H units, V characters of the vocabulary."""

    def __init__(self, kind: Recurrent, characters: int, units: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, units)
        self.recurrent = kind(units, units)
        self.head = nn.Linear(units, characters)

    def forward(self, codes: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Return the logits (B, T, V) for codes (B, T), and the state after the last of them."""
        steps = self.embed(codes).transpose(0, 1)  # (T, B, H)
        if isinstance(self.recurrent, nn.LSTM):
            hidden, state = self.recurrent(steps, state)
        else:
            each = []
            for x in steps:
                state = self.recurrent(x, state)
                each.append(state[0])
            hidden = torch.stack(each)
        return self.head(hidden.transpose(0, 1)), state


class Windows:
    """A text as codes, cut into windows of T characters that do not overlap."""

    def __init__(self, text: str, seq: int) -> None:
        self.vocabulary = sorted(set(text))
        code_of = {character: code for code, character in enumerate(self.vocabulary)}
        codes = torch.tensor([code_of[character] for character in text])
        count = (len(text) - 1) // seq
        if count < 1:
            sys.exit(f"the text has {len(text)} characters, a window of {seq} needs {seq + 1}")
        self.inputs = codes[: count * seq].view(count, seq)
        self.targets = codes[1 : count * seq + 1].view(count, seq)  # one character later

    def loss(self, model: CharModel, rows: Tensor) -> Tensor:
        """Return the mean loss on the windows rows (B,), each read from a zero state."""
        logits, _ = model(self.inputs[rows])
        return cross_entropy(logits.flatten(0, 1), self.targets[rows].flatten())


@dataclass
class Run:
    model: CharModel
    losses: list[float]  # one a step
    seconds: list[float]  # one a step


def train(name: str, windows: Windows, args: argparse.Namespace) -> Run:
    """Train on every window once an epoch, in an order drawn anew for each."""
    torch.manual_seed(args.seed)
    run = Run(CharModel(KINDS[name], len(windows.vocabulary), args.units), [], [])
    optimizer = torch.optim.Adam(run.model.parameters(), lr=3e-3)
    steps = args.epochs * math.ceil(len(windows.inputs) / args.batch)
    with tqdm(total=steps, desc=f"{name:>18}", unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            for rows in torch.randperm(len(windows.inputs)).split(args.batch):  # last: what is left
                start = perf_counter()
                loss = windows.loss(run.model, rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.losses.append(loss.item())
                run.seconds.append(perf_counter() - start)
                bar.set_postfix(loss=f"{run.losses[-1]:.3f}", batch=len(rows), refresh=False)
                bar.update()
    return run


@torch.no_grad()
def write(model: CharModel, prompt: Tensor, length: int) -> Tensor:
    """Continue prompt (T,) by length characters, each of them one call with batch 1."""
    codes = [prompt.unsqueeze(0)]
    state = None
    for _ in range(length):
        logits, state = model(codes[-1], state)
        codes.append(torch.multinomial(logits[:, -1].softmax(dim=-1), 1))
    return torch.cat(codes, dim=1).squeeze(0)


def print_curves(runs: dict[str, Run], lines: int = 12) -> None:
    """Print the losses side by side, averaged over stretches of steps, and the times."""
    stock, *_ = runs.values()
    names = "".join(f"{name:>20}" for name in runs)
    print(f"\n{'loss, steps':>14}{names}{'largest difference':>20}")
    steps = range(1, len(stock.losses) + 1)
    stretch = math.ceil(len(steps) / lines)
    for part in (slice(i, i + stretch) for i in range(0, len(steps), stretch)):
        losses = [mean(run.losses[part]) for run in runs.values()]
        print(f"{f'{steps[part][0]}-{steps[part][-1]}':>14}", end="")
        print("".join(f"{loss:20.4f}" for loss in losses), end="")
        print(f"{max(losses) - min(losses):20.1e}")
    print(f"\n{'time':>14}{names}")
    total = [sum(run.seconds) for run in runs.values()]
    middle = [median(run.seconds) * 1e3 for run in runs.values()]
    print(f"{'all steps, s':>14}" + "".join(f"{seconds:20.1f}" for seconds in total))
    print(f"{'median, ms':>14}" + "".join(f"{ms:20.1f}" for ms in middle))
    print(f"{'times as fast':>14}" + "".join(f"{middle[0] / ms:20.2f}" for ms in middle))


def plot_curves(runs: dict[str, Run], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, run), width in zip(runs.items(), (5, 2.5, 0.8), strict=True):
        axes.plot(run.losses, label=name, linewidth=width, alpha=0.7)
    axes.set(xlabel="step", ylabel="loss, nats per character")
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"\nthe curves are drawn in {file}")


@torch.no_grad()
def check_agreement(runs: dict[str, Run], windows: Windows, batches: list[int]) -> None:
    """Exit with an error unless all computed the same, at every one of these batches."""
    stock, *others = runs
    rows = [torch.arange(batch) for batch in batches]
    agree = True
    print(f"\nlargest difference of loss from {stock} (tolerance {TOLERANCE:.0e} for two of them):")
    for name in others:
        run = runs[name]
        apart = (torch.tensor(run.losses) - torch.tensor(runs[stock].losses)).abs()
        same = CharModel(KINDS[stock], *run.model.embed.weight.shape)
        weights = run.model.state_dict().values()  # the layer's have names of their own
        same.load_state_dict(dict(zip(same.state_dict(), weights, strict=True)))
        a, b = (torch.stack([windows.loss(m, r) for r in rows]) for m in (run.model, same))
        first, trained = apart[:CHECKED_STEPS].max(), (a - b).abs().max()
        print(f"  {name}:")
        print(f"    {first:.1e} in the first {CHECKED_STEPS} steps")
        print(f"    {trained:.1e} with the same trained weights in both, batches of {batches}")
        print(f"    {apart.max():.1e} in all steps")
        agree &= bool(first <= TOLERANCE and trained <= TOLERANCE)  # NaN fails too
    if not agree:
        sys.exit("they do not compute the same")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Train a character language model with {', '.join(KINDS)}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over the text")
    parser.add_argument("--batch", type=int, default=64, help="windows in a step")
    parser.add_argument("--units", type=int, default=128, help="of the recurrent module")
    parser.add_argument("--seq", type=int, default=64, help="characters in a window")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and sample")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--text", type=Path, help="a file to learn, instead of Python's own manual")
    parser.add_argument("--plot", type=Path, default="char_lm.png", help="where to draw the curves")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    text = args.text.read_text(encoding="utf-8") if args.text else "".join(topics.values())
    windows = Windows(text, args.seq)
    batches = [len(rows) for rows in torch.arange(len(windows.inputs)).split(args.batch)]
    print(f"{len(text)} characters, {len(windows.vocabulary)} different ones")
    print(
        f"{len(batches)} steps an epoch, the first with batch {batches[0]}, the last {batches[-1]}"
    )

    runs = {name: train(name, windows, args) for name in KINDS}
    print_curves(runs)
    plot_curves(runs, args.plot)
    check_agreement(runs, windows, sorted({1, *batches}))

    codes = write(runs["lstmfused.LSTM"].model, windows.inputs[0], length=400)
    print("\nsample, written by lstmfused.LSTM with batch 1:")
    print("".join(windows.vocabulary[code] for code in codes.tolist()))


if __name__ == "__main__":
    main()
