"""llama.cpp through llama-cpp-python's low-level API; the only importer of ``llama_cpp``.

::

    backend     the native library: symbols checked, logs routed, initialised once
    gguf        metadata of a file not yet loaded     memory     whether it will fit
    model       a loaded GGUF: weights, vocabulary, metadata
    context     what computes: one batch of tokens at a time
    packing     sequences -> pooled rows    chat       messages -> streamed text
    embedder    texts -> vectors            prompt     a request -> tokens, how to answer
    prefixes    model -> what it wants      template   messages -> text of a prompt
                before a text               scheduler  many prompts -> tokens of answers
    reranker    pairs -> scores             sampler    logits -> token
    pairs       query, document -> tokens   grammar    GBNF -> which tokens may follow
                                            answer     tokens -> pieces of an answer
                                            text       token bytes -> whole characters
    schema      JSON schema -> GBNF, with `overlap`, `ranges` and `rules`
    calls       tools -> GBNF, and what a model wrote -> calls, with `formats` and `tagged`
    turns       messages -> those that there is room for; jinja: templates in bounds
    abort       how a call that is being served can be stopped
    images      files, PDF pages -> pixels
    projector   pixels -> what a language model reads
    vision      images, messages -> streamed text
    minilm      safetensors -> GGUF

Nothing here knows about processes, channels or frames; the roles do.
"""
