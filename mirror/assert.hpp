// Assertions of our own invariants: on in release builds too. A failure is a bug of ours, never a
// consequence of input; it prints one line and aborts.
//
// Mutants: deliberate breaches of one rule each, compiled only with NBDFERRY_MUTANTS (tests), which
// must be caught by a test. In a normal build NBDFERRY_MUTANT(x) is the constant false.
#pragma once

namespace nbdferry {

[[noreturn]] void assertion_failed(const char* condition, const char* what, const char* file,
                                   int line);

#define NBDFERRY_ASSERT(condition, what)             \
  (__builtin_expect(static_cast<bool>(condition), 1) \
       ? static_cast<void>(0)                        \
       : ::nbdferry::assertion_failed(#condition, what, __FILE__, __LINE__))

#ifdef NBDFERRY_MUTANTS
// The name of the one active mutant, or null.
extern const char* active_mutant;
[[nodiscard]] bool mutant_is(const char* name);
#define NBDFERRY_MUTANT(name) (::nbdferry::active_mutant != nullptr && ::nbdferry::mutant_is(#name))
#else
#define NBDFERRY_MUTANT(name) false
#endif

}  // namespace nbdferry
