#include "handlers.h"

MLSPECQD_OF_FLOATS(bfloat16, BF16)
