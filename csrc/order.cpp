// Apart from the kernels, so that templates of the standard library are compiled for every processor.
#include <algorithm>
#include <functional>

#include "kernels.h"

namespace octavo {

void sort_largest(uint64_t* values, isize count, isize k) {
    std::nth_element(values, values + k - 1, values + count, std::greater<uint64_t>());
    std::sort(values, values + k, std::greater<uint64_t>());
}

}  // namespace octavo
