// The kernels as a process of their own, for a processor that this machine emulates.
//
// Memory is shared with who calls: a call lies at its start, with addresses as they are here.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "call.h"

extern "C" const char* ts_fields();
extern "C" int64_t ts_run(const ts::Call* call);

// emulated FILE BYTES: prints the fields and where the memory is; then, for every line that it
// reads, runs the call and prints what it returned.
int main(int, char** arguments) {
  int file = open(arguments[1], O_RDWR);
  void* memory = mmap(nullptr, strtoull(arguments[2], nullptr, 10), PROT_READ | PROT_WRITE,
                      MAP_SHARED, file, 0);
  if (file < 0 || memory == MAP_FAILED) return 1;
  printf("%s\n%llu\n", ts_fields(), (unsigned long long)memory);
  fflush(stdout);
  while (getchar() != EOF) {
    printf("%lld\n", (long long)ts_run(static_cast<ts::Call*>(memory)));
    fflush(stdout);
  }
  return 0;
}
