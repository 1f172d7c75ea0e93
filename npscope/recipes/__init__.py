"""What is to be done to the tensors of a file: from the words of a recipe to a plan for each tensor.

`pattern` and `layout` give a rule its blocks along the axes of a tensor, `recipe` has the rules and
`recipe_file` reads them, `members` and `allocation` say who competes for how many blocks, `scores`
what ranks them; `plans` is what comes out, by way of `planning`. `coupled` views tensors and slices
of tensors as one scope object. Nothing here writes a file, and only couplings and scores read values.
"""
