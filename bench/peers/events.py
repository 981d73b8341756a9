"""Times of work on this GPU."""
import torch


def median_ms(f, times, hidden):
    """Median of CUDA events over so many calls, three not counted; the GPU sleeps `hidden` clocks before each, which hides what the host does."""
    for _ in range(3):
        f()
    out = []
    for _ in range(times):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(hidden)
        a.record(); f(); b.record(); b.synchronize()
        out.append(a.elapsed_time(b))
    return sorted(out)[len(out) // 2]
