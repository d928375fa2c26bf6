// What we ask of the kernel's scheduler.
#pragma once

namespace nbdferry::proxy {

// Short turns on the processor, which come the sooner (EEVDF, Linux 6.12): a request waits for us, and takes
// less than a turn, but a busy neighbour keeps its whole turn of milliseconds until then. Inherited by threads
// that are made afterwards. Where the kernel knows no such thing, or a real-time policy was chosen, nothing.
void ask_for_short_turns() noexcept;

}  // namespace nbdferry::proxy
