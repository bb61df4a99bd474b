"""The offline API: `LLM` and `AsyncLLM`, prompts in, text out.

    llm = LLM("deepseek-ai/DeepSeek-V4-Flash")
    print(llm.generate("The capital of France is")[0].outputs[0].text)

Contract: names, keyword arguments and results follow vLLM's; docs/OFFLINE.md says where they differ.
Importing this loads no torch. It does not know HTTP, and does not parse chat answers.
"""

from fourfold.llm.offline import LLM, AsyncLLM
from fourfold.llm.results import CompletionOutput, Logprob, RequestMetrics, RequestOutput

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"]
