// The kernels as a process of their own, which may be emulated, or watched by a sanitizer.
//
// Memory is shared with who calls: a call lies at its start, with addresses as they are here.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <thread>
#include <vector>

#include "call.h"

extern "C" const char* ts_fields();
extern "C" int64_t ts_run(const ts::Call* call);
extern "C" void ts_use_region(void* region);

// In place of OpenMP's pool, which a sanitizer does not see into.
static void run_threads(void (*work)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < count; ++i) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

// apart FILE BYTES: prints the fields and where the memory is; then, for every line that it
// reads, runs the call and prints what it returned.
int main(int, char** arguments) {
  int file = open(arguments[1], O_RDWR);
  void* memory = mmap(nullptr, strtoull(arguments[2], nullptr, 10), PROT_READ | PROT_WRITE,
                      MAP_SHARED, file, 0);
  if (file < 0 || memory == MAP_FAILED) return 1;
  ts_use_region(reinterpret_cast<void*>(run_threads));
  printf("%s\n%llu\n", ts_fields(), (unsigned long long)memory);
  fflush(stdout);
  while (getchar() != EOF) {
    printf("%lld\n", (long long)ts_run(static_cast<ts::Call*>(memory)));
    fflush(stdout);
  }
  return 0;
}
