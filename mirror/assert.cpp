#include "mirror/assert.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace nbdferry {

void assertion_failed(const char* condition, const char* what, const char* file, int line) {
  std::fprintf(stderr, "nbdferry: bug: %s (%s) at %s:%d\n", what, condition, file, line);
  std::fflush(stderr);
  std::abort();
}

#ifdef NBDFERRY_MUTANTS
const char* active_mutant = nullptr;
bool mutant_is(const char* name) { return std::strcmp(active_mutant, name) == 0; }
#endif

}  // namespace nbdferry
