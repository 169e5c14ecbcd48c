"""llama.cpp in this process, by cyllama 0.2.18 and xllamacpp 2026.10: logits, quantisation, text, tokens."""

import json
import urllib.request

import numpy as np


def logits(file, ids):
    """(tokens, vocabulary) of one sequence, computed with an fp32 cache."""
    from cyllama.llama import llama_cpp as cpp

    class Model(cpp.LlamaModel):
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which its contexts ask for, and 0.2.18 lacks

    cpp.disable_logging()
    cpp.ggml_backend_load_all()
    model, params = Model(str(file)), cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = params.flash_attn_type = 0
    context = cpp.LlamaContext(model, params)
    batch = cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(token, place, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(place) for place in range(len(ids))], np.float32)


def quantise(file, out, file_type):
    """What llama-quantize makes of a file, `file_type` by its number."""
    from cyllama.llama import llama_cpp as cpp

    cpp.disable_logging()
    params = cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = file_type, 1
    cpp.model_quantize(str(file), str(out), params)


class Server:
    """llama-server in this process, greedy."""

    def __init__(self, file, lora=None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 1024, 1, False, 1
        if lora:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def ask(self, path, body):
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def generate(self, prompt, tokens):
        """Ids that follow a prompt of ids, until the model ends or there are so many."""
        greedy = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True}
        return self.ask("completion", greedy)["tokens"]

    def generate_scored(self, prompt, tokens):
        """The same, and the log-prob of each."""
        greedy = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True, "n_probs": 1}
        found = self.ask("completion", greedy)
        return found["tokens"], [each["logprob"] for each in found["completion_probabilities"]]

    def timings(self, prompt, tokens):
        """llama-server's own of a prompt that it has not seen and so many tokens after it."""
        every = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return self.ask("completion", every)["timings"]

    def tokenize(self, text):
        return self.ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
