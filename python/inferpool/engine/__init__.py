"""llama.cpp through llama-cpp-python's low-level API; the only importer of ``llama_cpp``.

::

    backend     the native library: symbols checked, logs routed, initialised once
    model       a loaded GGUF: weights, vocabulary, metadata
    context     what computes: one batch of tokens at a time, interruptible
    packing     sequences -> pooled rows    chat       messages -> streamed text
    embedder    texts -> vectors            template   messages -> prompt
    reranker    pairs -> scores             sampler    logits -> token
    prefixes    model -> what it wants in front of a query or document
    pairs       query, document -> tokens   text       token bytes -> whole characters
    minilm      safetensors -> GGUF

Nothing here knows about processes, channels or frames; the roles do.
"""
