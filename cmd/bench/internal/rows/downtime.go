package rows

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
)

var downtimeRow = Row{
	Name:  "downtime",
	What:  "from the old container's last instruction to the new one's first, at a restart",
	Limit: 2 * time.Minute,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return downtime(ctx, env, downtimeSize{rounds: 80, secrets: 100}, nil)
	},
}

type downtimeSize struct{ rounds, secrets int }

// downtime restarts the same program in four ways, in turn: a workspace by its actor; a
// bare container, stopped, removed, made and started by containerd's client; two
// processes without containers, of which one stands by; and two such in namespaces,
// as containers have them, for the kernel has these to take down.
func downtime(ctx context.Context, env *Env, size downtimeSize, around aroundFunc) (_ []measure.Result, err error) {
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
	hand, err := m.newByHand(ctx, env, "hand", 0)
	if err != nil {
		return nil, err
	}
	defer hand.close()
	apart, err := m.newByHand(ctx, env, "apart", unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS)
	if err != nil {
		return nil, err
	}
	defer apart.close()

	var ours, stopStart, floor, floorApart measure.Samples
	side := func(file string, into *measure.Samples, restart func() error) func() error {
		return func() error {
			if err := restart(); err != nil {
				return err
			}
			down, err := m.lastDowntime(ctx, file)
			into.Add(down, time.Millisecond)
			return err
		}
	}
	err = measure.Alternate(ctx, size.rounds,
		side("ours", &ours, func() error { return m.restart(ctx, "ours") }),
		side("bare", &stopStart, func() error { return bare.restart(ctx) }),
		side("hand", &floor, hand.restart),
		side("apart", &floorApart, apart.restart),
	)
	if err != nil {
		return nil, err
	}
	return []measure.Result{
		measure.Compare("downtime/stop-then-start", "ms", ours, "the same container stopped, removed, made and started", stopStart,
			measure.MedianAtMost(2), measure.P95AtMost(6), measure.RatioAtMost(1./40)),
		measure.Compare("downtime/floor", "ms", ours, "exit, wait and exec by hand, without containers", floor),
		measure.Compare("downtime/floor in namespaces", "ms", ours, "the same by hand, in namespaces", floorApart),
	}, nil
}

// lastDowntime is the time between the last two probes that wrote to the file,
// once the second one has.
func (m *machine) lastDowntime(ctx context.Context, file string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		records, err := m.records(file)
		if err != nil {
			return 0, err
		}
		if n := len(records); n%2 == 1 && n >= 3 { // start, end, ..., start
			return records[n-1].At - records[n-2].At, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("%s: %d records: %w", file, len(records), ctx.Err())
		}
	}
}

// byHand is a probe, and another process that waits to become one.
type byHand struct {
	ctx           context.Context // ends the processes
	program, file string
	namespaces    uintptr // each has of its own
	runs, waits   *exec.Cmd
	goAhead       io.Closer // of the one that waits
}

func (m *machine) newByHand(ctx context.Context, env *Env, file string, namespaces uintptr) (_ *byHand, err error) {
	h := &byHand{ctx: ctx, file: filepath.Join(m.probes(), file), namespaces: namespaces}
	if h.program, err = env.program(probeProgram); err != nil {
		return nil, err
	}
	h.runs = h.command(h.file)
	if err := h.runs.Start(); err != nil {
		return nil, err
	}
	return h, h.standBy()
}

func (h *byHand) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(h.ctx, h.program, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: h.namespaces}
	return cmd
}

func (h *byHand) standBy() (err error) {
	h.waits = h.command(h.file, h.program)
	if h.goAhead, err = h.waits.StdinPipe(); err != nil {
		return err
	}
	return h.waits.Start()
}

// restart ends the probe, waits for its end, and lets the other process become
// it: what every restart has to do, and nothing else.
func (h *byHand) restart() error {
	if err := h.runs.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	if err := h.runs.Wait(); err != nil {
		return err
	}
	if err := h.goAhead.Close(); err != nil {
		return err
	}
	h.runs = h.waits
	return h.standBy()
}

func (h *byHand) close() {
	for _, cmd := range []*exec.Cmd{h.runs, h.waits} {
		_ = cmd.Process.Kill() // an error says that it has ended
		_ = cmd.Wait()
	}
}
