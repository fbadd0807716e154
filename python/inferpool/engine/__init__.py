"""llama.cpp through llama-cpp-python's low-level API; the only importer of ``llama_cpp``.

::

    backend     the native library: symbols checked, logs routed, initialised once
    gguf        metadata of a file not yet loaded     memory     whether it will fit
    model       a loaded GGUF: weights, vocabulary, metadata
    context     what computes: one batch of tokens at a time, interruptible
    packing     sequences -> pooled rows    chat       messages -> streamed text
    embedder    texts -> vectors            prompt     a request -> tokens, how to answer
    prefixes    model -> what it wants      template   messages -> text of a prompt
                before a text               scheduler  many prompts -> tokens of answers
    reranker    pairs -> scores             sampler    logits -> token
    pairs       query, document -> tokens   grammar    GBNF -> which tokens may follow
                                            answer     tokens -> pieces of an answer
                                            text       token bytes -> whole characters
    images      files, PDF pages -> pixels
    projector   pixels -> what a language model reads
    vision      images, messages -> streamed text
    minilm      safetensors -> GGUF

Nothing here knows about processes, channels or frames; the roles do.
"""
