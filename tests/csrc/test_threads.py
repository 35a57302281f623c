"""Parallel regions: a calling thread that has waited for others in vain works alone for a while."""

import os
import subprocess
from pathlib import Path

import host_executor
import pytest

pytestmark = pytest.mark.skipif(host_executor.GXX is None, reason=host_executor.NO_GXX)

CSRC = Path(__file__).parents[2] / "csrc"

# Who sleeps is not on a processor, as if another process were: a region of 10 ms in which nobody works. The threads
# have paid for nothing, by at least 10 ms, and the next 320 ms belong to the calling thread.
SOURCE = r"""
#include <chrono>
#include <cstdio>
#include <initializer_list>
#include <thread>
#include "cpu/threads.h"

using namespace lipgan::cpu;
using Clock = std::chrono::steady_clock;
constexpr auto kSleep = std::chrono::milliseconds(10);

void sleepers(void*, const Team&) { std::this_thread::sleep_for(kSleep); }
void late(void*, const Team& team) {
  if (team.thread == 1) std::this_thread::sleep_for(kSleep);
  team.barrier();
}

int of_another_thread() {
  int threads = 0;
  std::thread([&] { threads = usable_threads(2); }).join();
  return threads;
}

int main() {
  int wrong = 0;
  const auto expect = [&](const char* what, bool holds) {
    if (!holds) std::printf("%s\n", what), ++wrong;
  };
  expect("threads at first", usable_threads(2) == 2);
  for (const Worker worker : {sleepers, late}) {
    const auto begin = Clock::now();
    run_parallel(worker, nullptr, 2);
    expect("alone after a wait", usable_threads(2) == 1);
    expect("alone for one reason only", usable_threads(1) == 1);
    expect("others are not concerned", of_another_thread() == 2);
    insist_on_threads(true);
    expect("threads where they are insisted on", usable_threads(2) == 2);
    insist_on_threads(false);
    expect("still alone", usable_threads(2) == 1);
    const auto limit = begin + std::chrono::seconds(30);
    while (usable_threads(2) == 1 && Clock::now() < limit) std::this_thread::sleep_for(kSleep);
    expect("threads again", usable_threads(2) == 2);
    expect("not too soon", Clock::now() - begin >= kPatience * kSleep);
  }
  run_parallel(sleepers, nullptr, 1);
  expect("one thread waits for nobody", usable_threads(2) == 2);
  return wrong;
}
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the processors of a process are Linux's")
def test_threads_that_did_not_pay(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    assert host_executor.GXX is not None
    source, program = tmp_path / "threads.cpp", tmp_path / "threads"
    source.write_text(SOURCE)
    cpu = [str(CSRC / "cpu" / name) for name in ("threads.cpp", "memory.cpp")]
    command = [host_executor.GXX, "-std=c++17", "-O1", f"-I{CSRC}", str(source), *cpu, "-ldl", "-pthread"]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
