#include "handlers.h"

MLSPECQD_HANDLERS(float16, F16)
