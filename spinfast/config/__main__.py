from spinfast.config import reference_table

print(reference_table())
