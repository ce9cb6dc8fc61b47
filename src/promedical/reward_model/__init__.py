"""The reward model: conversations as trees, their attention, the model, its training and grading.

One instruction is a tree x → y_1 … y_n → c_1 … c_K of conversation, responses and criteria
(section 7.1 of the method). `render` turns text into a tree of token ids, `tree` packs trees into
rows, `attention` runs a row through a transformer as if every root-to-leaf path were alone.
"""
