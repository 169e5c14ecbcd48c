"""Texts that tokenizers part at, and the rules by which they split, as steps before the byte-level one."""

from tokenizers import Regex, pre_tokenizers

from spinfast.weights.gguf_tokenizer import WORDS

NASTY = [
    "What is 12+345 - 6,789.01?\n\n\nStep 1\n\n1) don't  DON'T we'll I'M",
    "  two  spaces   and\ttabs\t\t and trailing   ",
    "\r\n\r\n mixed \n \r line ends\n",
    "naïve Ünïcode 你好，世界 नमस्ते 🙂👍🏽 ½ ² ٣",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "code: for(i=0;i<10;i++){x[i]+=1;} // 'quoted' \"text\"",
    "a\u00a0b\u2003c\u200bd ▁e",
    "",
    " ",
    "\n",
]
RULES = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(True)],
    "qwen2": [pre_tokenizers.Split(Regex(WORDS % ""), "isolated")],
    "llama-bpe": [pre_tokenizers.Split(Regex(WORDS % "{1,3}"), "isolated")],
}
