"""Recurrent PPO of sb3-contrib on CartPole without its velocities: unchanged and with lstmfused.

The library steps its LSTMs in Python wherever an episode begins within a minibatch, which on this
task is always. With lstmfused the whole minibatch is one call, `process_sequence`, and a mask tells
where episodes begin. All runs start from one seed and take the same actions until rounding, which
training amplifies, turns one of them. From there on the curves can only be alike. --control shows
how far rounding alone moves them: it runs the unchanged library again, its weights rounded up.

The policy has not changed when an update begins, so the importance ratio of its first minibatch
should be 1. The third run has it so to the bit: the LSTMs step in the rollout as they run over the
minibatch, in batch-invariant mode, and the linear layers above them compute row by row, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import lstmfused

# After one update the runs differ by rounding alone, about 1e-7. A missed reset or a gradient that
# gets lost exceeds 1e-4.
TOLERANCE = 1e-5
LAST = 50  # episodes that a mean reward is of

State = tuple[Tensor, Tensor]  # hidden and cell, each (layers, n_seq, H)


def process_sequence(
    features: Tensor, lstm_states: State, episode_starts: Tensor, lstm: lstmfused.LSTM
) -> tuple[Tensor, State]:
    """In place of RecurrentActorCriticPolicy._process_sequence: features (n_seq * T, I) -> output
    (n_seq * T, H). In a rollout, T is 1 and n_seq the number of environments."""
    n_seq = lstm_states[0].shape[1]
    x = features.reshape(n_seq, -1, lstm.input_size).transpose(0, 1)
    starts = episode_starts.reshape(n_seq, -1).transpose(0, 1)
    output, lstm_states = lstm(x, lstm_states, reset=starts != 0)
    return output.transpose(0, 1).flatten(0, 1), lstm_states


def fuse(policy: Any) -> None:
    lstmfused.fuse_(policy)
    policy._process_sequence = process_sequence


class RowLinear(nn.Linear):
    """Sums each row in one order whatever the batch, which a matrix product does not promise."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = Rows.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.unsqueeze(1) * weight).sum(2) + bias

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return d @ weight, d.t() @ x, d.sum(0)


def fuse_to_the_bit(policy: Any) -> None:
    fuse(policy)
    for head in (policy.mlp_extractor.policy_net, policy.action_net):
        for module in head.modules():
            if type(module) is nn.Linear:
                module.__class__ = RowLinear


def round_up(policy: Any) -> None:
    """Each weight becomes the next larger number."""
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(p.nextafter(p.new_tensor(torch.inf)))


RUNS: dict[str, Callable[[Any], None]] = {
    "unchanged": lambda policy: None,
    "lstmfused": fuse,
    "batch-invariant": fuse_to_the_bit,
    "control": round_up,
}


class Positions(gymnasium.ObservationWrapper):  # type: ignore[misc]
    """CartPole's positions of cart and pole without their velocities: a policy must remember."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        low, high = env.observation_space.low[[0, 2]], env.observation_space.high[[0, 2]]
        self.observation_space = gymnasium.spaces.Box(low, high)

    def observation(self, observation: Any) -> Any:
        return observation[[0, 2]]


@dataclass
class Run:
    learn: float = 0.0  # seconds
    train: float = 0.0  # seconds, of those
    rewards: list[tuple[int, float]] = field(default_factory=list)  # step and sum, one an episode
    actions: list[Any] = field(default_factory=list)  # one array a rollout
    ratios: list[float] = field(default_factory=list)  # largest |ratio - 1|, one a rollout
    updated: Tensor | None = None  # all parameters after the first update


class TimedPPO(RecurrentPPO):  # type: ignore[misc]
    run: Run

    def train(self) -> None:
        start = perf_counter()
        super().train()
        self.run.train += perf_counter() - start
        if self.run.updated is None:
            self.run.updated = parameters_to_vector(self.policy.parameters()).detach()


class Record(BaseCallback):  # type: ignore[misc]
    def __init__(self, run: Run, bar: Any) -> None:
        super().__init__()
        self.run, self.bar = run, bar

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.run.rewards.append((self.num_timesteps, float(info["episode"]["r"])))
        self.bar.update(self.training_env.num_envs)
        return True

    def _on_rollout_end(self) -> None:
        """Compare with the rollout what the update is going to begin with; this is not timed."""
        start = perf_counter()
        model: Any = self.model
        self.run.actions.append(model.rollout_buffer.actions.copy())
        drawn = np.random.get_state()
        data = next(model.rollout_buffer.get(model.batch_size))
        np.random.set_state(drawn)  # the update draws the same minibatch
        _, log_prob, _ = model.policy.evaluate_actions(
            data.observations, data.actions.long().flatten(), data.lstm_states, data.episode_starts
        )
        ratio = (log_prob - data.old_log_prob).exp()
        self.run.ratios.append((ratio - 1).abs()[data.mask > 0].max().item())
        rewards = mean_reward(self.run)
        self.bar.set_postfix(reward=f"{rewards:.0f}", refresh=False)
        self.run.learn -= perf_counter() - start


def mean_reward(run: Run) -> float:
    return mean([reward for _, reward in run.rewards[-LAST:]] or [0.0])


def learn(name: str, args: argparse.Namespace) -> Run:
    env = Positions(gymnasium.make("CartPole-v1"))
    units = {"lstm_hidden_size": args.units}
    model = TimedPPO("MlpLstmPolicy", env, policy_kwargs=units, seed=args.seed, device="cpu")
    model.run = Run()
    RUNS[name](model.policy)
    mode = lstmfused.batch_invariant() if name == "batch-invariant" else nullcontext()
    with mode, tqdm(total=args.steps, desc=f"{name:>15}", unit="step", disable=None) as bar:
        start = perf_counter()
        model.learn(args.steps, callback=Record(model.run, bar))
        model.run.learn += perf_counter() - start
    return model.run


def same_steps(one: Run, other: Run) -> int:
    """Steps until the two take different actions."""
    a, b = (np.concatenate(run.actions).ravel() for run in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else len(a)


def print_table(runs: dict[str, Run]) -> None:
    stock = runs["unchanged"]
    print(f"\n{'':>34}" + "".join(f"{name:>17}" for name in runs))
    rows = {
        "learn, s": [f"{run.learn:.1f}" for run in runs.values()],
        "of it train, s": [f"{run.train:.1f}" for run in runs.values()],
        "learn, times as fast": [f"{stock.learn / run.learn:.2f}" for run in runs.values()],
        "train, times as fast": [f"{stock.train / run.train:.2f}" for run in runs.values()],
        f"mean reward, last {LAST} episodes": [f"{mean_reward(run):.1f}" for run in runs.values()],
        "largest |ratio - 1|": [f"{max(run.ratios):.1e}" for run in runs.values()],
        "steps with the same actions": [str(same_steps(stock, run)) for run in runs.values()],
    }
    for title, values in rows.items():
        print(f"{title:>34}" + "".join(f"{value:>17}" for value in values))


def draw(runs: dict[str, Run], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, run), width in zip(runs.items(), (5.0, 2.5, 1.0, 1.0), strict=False):
        steps, rewards = np.array(run.rewards).reshape(-1, 2).T
        sums = np.cumsum(np.insert(rewards, 0, 0.0))
        first = np.maximum(np.arange(len(steps)) + 1 - LAST, 0)
        means = (sums[1:] - sums[first]) / (np.arange(len(steps)) + 1 - first)
        curve.plot(steps, means, label=name, linewidth=width, alpha=0.3 + 0.6 / width)
    curve.set(xlabel="step", ylabel=f"reward, mean of {LAST} episodes")
    curve.legend()
    train = [run.train for run in runs.values()]
    rollout = [run.learn - run.train for run in runs.values()]
    bars.bar(list(runs), train, label="train")
    bars.bar(list(runs), rollout, bottom=train, label="rollouts")
    bars.set(ylabel="seconds")
    bars.legend()
    figure.savefig(file, dpi=150)
    print(f"\nthe curves are drawn in {file}")


def check_agreement(runs: dict[str, Run]) -> None:
    """Exit with an error unless all runs begin alike and the ratios are 1 where they should be."""
    stock = runs["unchanged"]
    failed = False
    print(f"\nlargest difference from unchanged after an update (tolerance {TOLERANCE:.0e}):")
    for name, run in runs.items():
        if name != "unchanged" and run.updated is not None and stock.updated is not None:
            apart = (run.updated - stock.updated).abs().max()
            print(f"  {apart:.1e} in the parameters of {name}")
            failed |= not (apart <= TOLERANCE and np.array_equal(run.actions[0], stock.actions[0]))
    if failed:  # NaN fails, too
        sys.exit("the runs do not begin alike")
    if max(runs["batch-invariant"].ratios) > 0:
        sys.exit("a ratio is not 1 in batch-invariant mode")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train sb3-contrib's RecurrentPPO, unchanged and with lstmfused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=16384, help="of the environment, in each run")
    parser.add_argument("--seed", type=int, default=0, help="of weights, environment and actions")
    parser.add_argument("--units", type=int, default=128, help="of each LSTM")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--control", action="store_true", help="run unchanged again, its weights rounded up"
    )
    parser.add_argument(
        "--picture", type=Path, default="recurrent_ppo.png", help="where to draw the curves"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    runs = {name: learn(name, args) for name in RUNS if name != "control" or args.control}
    print_table(runs)
    draw(runs, args.picture)
    check_agreement(runs)


if __name__ == "__main__":
    main()
