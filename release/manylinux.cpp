// What the extension takes from libstdc++ and glibc that is newer than manylinux_2_28, for release/manylinux.py. Each is
// hidden in the extension. The toolchain of manylinux itself does the same, by a libstdc++_nonshared.a.

#define _GLIBCXX_EXTERN_TEMPLATE 0  // templates are compiled here, not taken from libstdc++

#include <new>
#include <sstream>

// GLIBCXX_3.4.26
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

// GLIBCXX_3.4.29
void std::__throw_bad_array_new_length() { throw bad_array_new_length(); }

// GLIBC_2.32. By it libstdc++ asks whether it may do without atomic operations: it may not.
extern "C" {
char __libc_single_threaded = 0;
}
