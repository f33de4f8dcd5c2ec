// The table of one instruction set; OCTAVO_ISA is its namespace, OCTAVO_NAME what the log calls it.
#pragma once

#include "experts.h"
#include "layer.h"
#include "logprobs.h"
#include "race.h"

namespace octavo::OCTAVO_ISA {

inline const Kernels table = {OCTAVO_NAME, norm,   gate,      rotary, store_kv, product, gather,
                              argmax,      greedy, sample,    logprobs, attention, layer, decoder, grouped, combine};

}  // namespace octavo::OCTAVO_ISA
