// The kernels for one instruction set and the table of them. CMakeLists.txt compiles this once for each set, with its
// flags; OCTAVO_ISA is the set's namespace and what the log calls it.
#include "impl/experts.h"
#include "impl/layer.h"
#include "impl/logprobs.h"
#include "impl/race.h"

#define OCTAVO_QUOTED(name) #name
#define OCTAVO_NAME_OF(isa) OCTAVO_QUOTED(isa)
#define OCTAVO_JOINED(isa) isa##_kernels
#define OCTAVO_GETTER_OF(isa) OCTAVO_JOINED(isa)

namespace octavo {
namespace OCTAVO_ISA {

const Kernels table = {OCTAVO_NAME_OF(OCTAVO_ISA),
                       norm,   gate,   rotary, store_kv, product,   gather, argmax,  greedy,
                       sample, logprobs, attention, layer, decoder, grouped, combine};

}  // namespace OCTAVO_ISA

const Kernels& OCTAVO_GETTER_OF(OCTAVO_ISA)() { return OCTAVO_ISA::table; }

}  // namespace octavo
