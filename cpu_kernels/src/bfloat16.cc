#include "handlers.h"

MLSPECQD_HANDLERS(bfloat16, BF16)
