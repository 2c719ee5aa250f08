#include "handlers.h"

MLSPECQD_HANDLERS(float32, F32)
