// Threads that share out the pieces of a loop. Not OpenMP: there a loop ends when every thread of the team has arrived,
// so one that the system has taken off its core holds up all others for whole time slices, at each of the hundred loops
// of a step. Here a thread that is not running has no piece, and whoever runs does the work.
#pragma once

#include "kernels.h"

namespace octavo {

using Piece = void (*)(void* context, isize first, isize last);

// Runs piece(context, first, last) over parts of [0, count), on the calling thread and idle helpers; returns when all of
// it is done. Called while another thread's loop runs, it does everything itself.
void share(isize count, Piece piece, void* context);

// How many threads work on a loop, the calling one included.
void set_threads(int count);
int threads();

}  // namespace octavo
