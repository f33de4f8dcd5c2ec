// The kernels of isa_amx_bf16.cpp on any processor, slowly, for tests: AMX's instructions are emulated.
#define OCTAVO_ISA amx_emulated
#define OCTAVO_NAME "amx_emulated"
#define OCTAVO_EMULATED_AMX
#include "impl/table.h"

const octavo::Kernels& octavo::amx_emulated_kernels() { return octavo::amx_emulated::table; }
