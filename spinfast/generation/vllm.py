"""Answers by vLLM, in this process: its engine holds the one copy of the base, the policy trains on views of it.

The adapter reaches the engine from memory, copied, under a fresh id whenever its content changes; the prefix cache is
dropped with it. Requests enter all at once and leave as they finish (continuous batching); each has its own seed, and
prompts with a common start share their K/V blocks. vLLM is imported only on entering.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from spinfast import attention
from spinfast.errors import UserError
from spinfast.generation import vllm_compat, weight_sharing, with_sampling
from spinfast.model_check import window
from spinfast.policy.adapters import files as adapters
from spinfast.types import Adapter, Completion, Request, Sampling, Token

Serving = Callable[[Adapter | None], tuple[AbstractContextManager, Adapter | None]]


class VLLMGenerator:
    """Implements spinfast.generation.Generator. Enter it before asking for the shared model.

    Same request, same answer while the batch composition is the same: the random stream depends on the request's
    seed alone, but logits round differently in batches of different size, and answers may fork on near ties.
    """

    name, takes_turns = "vllm", False

    def __init__(
        self,
        model_path: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        max_lora_rank: int,
        kv_cache_bytes: int = 1 << 30,
        batch_size: int = 64,
        seed: int = 0,
        enforce_eager: bool = False,
        capability: tuple[int, int] | None = None,
        slots: int = 1,
        engine=None,
    ):
        """`capability` is a GPU's, which decides on the attention kernel. `slots`: adapters in one batch, for `mixed`.

        `engine` is an LLM that holds the weights already (Unsloth's); then kv_cache_bytes and batch_size are its."""
        self.model_path = Path(model_path)
        self.device = device
        self.capability = capability
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.max_lora_rank = max_lora_rank
        shape = AutoConfig.from_pretrained(self.model_path, local_files_only=True)
        self._options = {
            "kv_cache_memory_bytes": max(kv_cache_bytes, self._smallest_cache(shape)),
            "max_num_seqs": batch_size,
            "seed": seed,
            "enforce_eager": enforce_eager,
            **_lora_options(max_lora_rank, slots),
        }
        if window(shape) is not None:  # no sequence reaches it (session.check_limits), and vLLM may refuse it
            full = ["full_attention"] * shape.num_hidden_layers
            overrides = {"layer_types": full, "use_sliding_window": False, "sliding_window": None}
            self._options["hf_overrides"] = overrides
        self._made = engine
        self._sleeps = engine is None and vllm_compat.can_sleep(device)
        self._asleep = False
        self.serving: Serving = lambda adapter: (nullcontext(), adapter)  # a policy's, whose kind may be another
        self._engine = None
        self._adapter: tuple[str, int] | None = None  # fingerprint and id of what stands in the slot
        self._numbers = itertools.count(1)

    def _smallest_cache(self, shape) -> int:
        """Bytes of one answer at full length in blocks of up to 256 tokens; vLLM does not start with less."""
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head * self.dtype.itemsize
        return per_token * (self.max_model_len + 256)

    def __enter__(self) -> VLLMGenerator:
        if self._made is not None:
            self._engine = self._made.llm_engine
            return self
        vllm_compat.prepare(self.device, self.capability)
        device_arguments = vllm_compat.arguments(
            self.device, self.capability, self.max_model_len, self._options["kv_cache_memory_bytes"], self._sleeps
        )
        from vllm import EngineArgs, LLMEngine

        options = {
            "model": str(self.model_path),
            "skip_tokenizer_init": True,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "logprobs_mode": "processed_logprobs",  # those that tokens are drawn by
            "use_tqdm_on_load": False,
        }
        with vllm_compat.undisturbed():
            self._engine = LLMEngine.from_engine_args(EngineArgs(**options | self._options | device_arguments))
        return self

    def __exit__(self, *exc) -> None:
        engine, self._engine, self._adapter = self.engine, None, None
        vllm_compat.shut_down(engine)

    @property
    def engine(self):
        if self._engine is None:
            raise RuntimeError("the vLLM engine is not running; use the generator inside its with block")
        return self._engine

    @property
    def _idle_engine(self):
        if self.engine.has_unfinished_requests():
            raise RuntimeError("an earlier generate() is not finished; exhaust or close its iterator first")
        return self.engine

    # The weights -----------------------------------------------------------------------------------------------

    @property
    def engine_model(self) -> torch.nn.Module:
        return vllm_compat.model_runner(self.engine).get_model()  # .model may be wrapped for CUDA graphs

    def shared_model(self, attn_implementation: str = attention.NAME) -> PreTrainedModel:
        """A transformers model on the engine's own tensors; valid as long as either is in use."""
        return weight_sharing.shared_model(self.model_path, self.engine_model, self.dtype, attn_implementation)

    def serve(self, policy, dense_layers: int = 0) -> None:
        """Answer for this policy, which is on the engine's weights."""
        self.serving = policy.serving

    def rest(self) -> None:
        """Free the K/V cache until the next answer, where vLLM can free it alone; elsewhere it keeps its bytes."""
        if self._sleeps and not self._asleep:
            vllm_compat.release_kv_cache(self._idle_engine)
            self._asleep = True

    # Generation ------------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], sampling: Sampling | Sequence[Sampling], adapter: Adapter | None
    ) -> Iterator[Completion]:
        """Completions as they finish. Samples of a prompt share its full K/V blocks while none of them is evicted."""
        return self._completions(with_sampling(requests, sampling, self.max_model_len), adapter)

    def mixed(
        self, requests: Sequence[Request], sampling: Sampling, adapters: Sequence[Path | None]
    ) -> Iterator[Completion]:
        """Answers as they finish, each request's under the adapter that a PEFT directory holds, or the base: in one
        batch, `slots` of the adapters at a time. vLLM reads the directories, as a server of it would."""
        asked = with_sampling(requests, sampling, self.max_model_len)
        prompts = [(*_prompt(*each), lora) for each, lora in zip(asked, self._loras(adapters), strict=True)]
        for position, output in self._stepped(prompts):
            yield _completion(output, *asked[position])

    def mixed_logps(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[Path | None]
    ) -> Iterator[tuple[int, list[float]]]:
        """(position, log-probs of the prompt's [1:]) as they finish, each under an adapter as in `mixed`."""
        loras = zip(prompts, self._loras(adapters), strict=True)
        for position, output in self._stepped([(ids, _scoring_params(), lora) for ids, lora in loras]):
            yield position, _prompt_logps(output, prompts[position])

    def prompt_logps(self, prompt_ids: Sequence[int], adapter: Adapter | None) -> list[float]:
        """Log-probs of prompt_ids[1:], each given what stands before it."""
        ((_, output),) = self._run([(prompt_ids, _scoring_params())], adapter)
        return _prompt_logps(output, prompt_ids)

    def _completions(self, asked: Sequence[tuple[Request, Sampling]], adapter: Adapter | None) -> Iterator[Completion]:
        for position, output in self._run([_prompt(*each) for each in asked], adapter):
            yield _completion(output, *asked[position])

    def _run(self, prompts: Sequence[tuple], adapter: Adapter | None) -> Iterator[tuple[int, object]]:
        """(position, vLLM's output) as the prompts finish; leaving early drops the rest.

        Where the policy has to be another one meanwhile, all are awaited first.
        """
        weights, lora = self.serving(adapter)
        if isinstance(weights, nullcontext):
            yield from self._outputs(prompts, lora)
            return
        with weights:
            outputs = list(self._outputs(prompts, lora))
        yield from outputs

    def _outputs(self, prompts: Sequence[tuple], adapter: Adapter | None) -> Iterator[tuple[int, object]]:
        engine = self._idle_engine
        if self._asleep:
            vllm_compat.restore_kv_cache(engine)
            self._asleep = False
        lora_request = self.swap(adapter)
        vllm_compat.reset_prefix_cache(engine)  # adapter and, where rounds are merged, base may have changed
        yield from self._stepped([(*prompt, lora_request) for prompt in prompts])

    def _stepped(self, prompts: Sequence[tuple]) -> Iterator[tuple[int, object]]:
        """(position, vLLM's output) of prompts, each with its sampling and its adapter, all at once in the engine."""
        engine, open_requests = self._idle_engine, {}
        for position, (prompt_ids, params, lora_request) in enumerate(prompts):
            name = str(next(self._numbers))
            engine.add_request(name, {"prompt_token_ids": list(prompt_ids)}, params, lora_request=lora_request)
            open_requests[name] = position
        try:
            while open_requests:
                for output in engine.step():
                    yield open_requests.pop(output.request_id), output
        finally:
            if open_requests:
                engine.abort_request(list(open_requests))

    def _loras(self, adapters: Sequence[Path | None]) -> list:
        """vLLM's requests for them, one id for each directory."""
        from vllm.lora.request import LoRARequest

        self._adapter = None  # theirs are the slots now
        named = {path: LoRARequest(str(path), next(self._numbers), str(path)) for path in {*adapters} - {None}}
        return [named.get(path) for path in adapters]

    def batch(self, adapter: Adapter | None) -> EngineBatch:
        """Answers token by token; no other batch meanwhile. Prompts that begin alike share their K/V blocks."""
        weights, lora = self.serving(adapter)
        if not isinstance(weights, nullcontext):
            raise UserError(
                "vLLM answers as one of base and whole trained weights, not in turn: use --backend transformers, or "
                "spinfast merge and the model that it makes"
            )
        return EngineBatch(self._idle_engine, self.swap(lora), self._numbers)

    def swap(self, adapter: Adapter | None):
        """vLLM's request for the adapter, put into the engine's slot if its content is not what stands there."""
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        content = adapters.fingerprint(adapter)
        if self._adapter is None or self._adapter[0] != content:
            if adapter.config["r"] > self.max_lora_rank:
                raise UserError(f"adapter: rank {adapter.config['r']} exceeds max_lora_rank {self.max_lora_rank}")
            self._adapter, number = None, next(self._numbers)
            vllm_compat.install_adapter(self.engine, adapter, number)
            self._adapter = content, number
        number = self._adapter[1]
        return LoRARequest(f"adapter-{number}", number, "in-memory")


class EngineBatch:
    """Implements spinfast.generation.Batch."""

    def __init__(self, engine, lora_request, numbers: Iterator[int]):
        self.engine, self.lora_request, self.numbers = engine, lora_request, numbers
        self.open: dict[str, tuple[Request, Sampling]] = {}

    def __len__(self) -> int:
        return len(self.open)

    def add(self, request: Request, sampling: Sampling) -> None:
        name, params = str(next(self.numbers)), _sampling_params(sampling, request.seed, stream=True)
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self.engine.add_request(name, prompt, params, lora_request=self.lora_request)
        self.open[name] = request, sampling

    def drop(self, request: Request) -> None:
        names = [name for name, (asked, _) in self.open.items() if asked == request]
        self.engine.abort_request(names)
        self.open = {name: asked for name, asked in self.open.items() if name not in names}

    def step(self) -> list[Token]:
        found = []
        for output in self.engine.step():
            request, sampling = self.open[output.request_id]
            answer = output.outputs[0]
            for token, logps in zip(answer.token_ids, answer.logprobs, strict=True):
                found.append(Token(request, token, float(logps[token].logprob)))
            if output.finished:
                del self.open[output.request_id]
                reason = "stop" if found[-1].id in sampling.stop_ids else "length"
                found[-1] = replace(found[-1], ends=reason)
        return found


def _prompt(request: Request, sampling: Sampling) -> tuple:
    return request.prompt_ids, _sampling_params(sampling, request.seed)


def _completion(output, request: Request, sampling: Sampling) -> Completion:
    answer = output.outputs[0]
    reason = "stop" if answer.token_ids[-1] in sampling.stop_ids else "length"
    scored = zip(answer.token_ids, answer.logprobs, strict=True)
    logps = tuple(float(logps[token].logprob) for token, logps in scored)
    cached = output.num_cached_tokens or 0
    return Completion(request.index, tuple(answer.token_ids), reason, logps, request.sample, cached)


def _prompt_logps(output, prompt_ids: Sequence[int]) -> list[float]:
    scored = zip(prompt_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [logps[token].logprob for token, logps in scored]


def _scoring_params():
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)


def _sampling_params(sampling: Sampling, seed: int, stream: bool = False):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # stop_ids decide, not the checkpoint's generation config
        seed=seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def _lora_options(rank: int, slots: int) -> dict:
    """None at rank 0. vLLM allocates its slots for one of a few ranks."""
    return {"enable_lora": True, "max_loras": slots, "max_lora_rank": served_rank(rank)} if rank else {}


def served_rank(rank: int) -> int:
    """The least of the ranks that vLLM has slots for in which this one has room."""
    ranks = (8, 16, 32, 64, 128, 256, 320, 512)
    if rank > ranks[-1]:
        raise UserError(
            f"adapter.r: vLLM serves ranks up to {ranks[-1]}, got {rank}; use generation.backend: transformers"
        )
    return next(served for served in ranks if served >= rank)
