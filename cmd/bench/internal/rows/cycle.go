package rows

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

var cycleRow = Row{
	Name:  "cycle",
	What:  "a whole cycle, from the request to nothing left of the old container: time, and processor time of the whole machine",
	Limit: 2 * time.Minute,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return cycle(ctx, env, cycleSize{rounds: 10, block: 5, secrets: 100}, busyTime, nil)
	},
}

// cycleSize: in each round each side makes block cycles.
type cycleSize struct{ rounds, block, secrets int }

// cycle replaces a workspace's container by its actor, and a bare one by the same
// calls of containerd's client. The processor time is the machine's, since most of
// it is spent by processes that live for some milliseconds; it is measured over a
// block, for the kernel counts it in ticks.
func cycle(ctx context.Context, env *Env, size cycleSize, busy func() (time.Duration, error), around aroundFunc) (_ []measure.Result, err error) {
	m, err := startMachine(ctx, env, around)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close(ctx)) }()
	if err := m.create(ctx, "ours", size.secrets); err != nil {
		return nil, err
	}
	bare, err := m.newBare(ctx, "ours", "bare", size.secrets)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bare.close(ctx)) }()

	var oursWall, oursCPU, bareWall, bareCPU measure.Samples
	side := func(wall, cpu *measure.Samples, replace func(context.Context) error) func() error {
		return func() error {
			before, err := busy()
			if err != nil {
				return err
			}
			for range size.block {
				if err := measure.Timed(wall, time.Millisecond, 1, func() error { return replace(ctx) })(); err != nil {
					return err
				}
			}
			after, err := busy()
			cpu.Add((after-before)/time.Duration(size.block), time.Millisecond)
			return err
		}
	}
	err = measure.Alternate(ctx, size.rounds,
		side(&oursWall, &oursCPU, func(ctx context.Context) error { return m.restart(ctx, "ours") }),
		side(&bareWall, &bareCPU, bare.replace),
	)
	if err != nil {
		return nil, err
	}
	const beside = "the same calls by containerd's client"
	return []measure.Result{
		measure.Compare("cycle/time", "ms", oursWall, beside, bareWall, measure.RatioAtMost(1.1)),
		measure.Compare("cycle/processor", "ms", oursCPU, beside, bareCPU, measure.RatioAtMost(1.1)),
	}, nil
}

// replace makes and starts a container and then ends and removes the older one,
// as a cycle does.
func (b *bare) replace(ctx context.Context) (err error) {
	if b.image, err = b.client.GetImage(ctx, b.image.Name()); err != nil {
		return err
	}
	old := *b
	return errors.Join(b.start(ctx), old.stop(ctx))
}

// busyTime is how long the machine's processors were not idle since its boot.
func busyTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return parseBusy(string(b))
}

// tick is the unit of /proc/stat, whatever the kernel's own is.
const tick = 10 * time.Millisecond

// parseBusy adds up user, nice, system, irq and softirq of all processors.
func parseBusy(stat string) (time.Duration, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var busy time.Duration
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat begins with %q: %w", line, err)
		}
		busy += time.Duration(n) * tick
	}
	return busy, nil
}
