package rows

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

type adoptSize struct{ rounds, containers int }

// adopt kills daemons, real ones, and starts them again: one that has so many
// running containers, until it serves and watches every one of them for its end,
// and one that has none, until it serves. step, which may be nil, is done before
// the first one is asked whether it does.
func adopt(ctx context.Context, env *Env, size adoptSize, step func()) (_ []measure.Result, err error) {
	dir, remove, err := env.temp("a")
	if err != nil {
		return nil, err
	}
	containerd := &lab.Containerd{Dir: filepath.Join(dir, "ctrd")}
	if err := containerd.Start(ctx); err != nil {
		return nil, errors.Join(err, remove())
	}
	var daemons []*lab.Daemon
	defer func() {
		var errs []error
		for _, d := range daemons {
			errs = append(errs, d.Stop(), d.Purge(ctx))
		}
		errs = append(errs, containerd.Stop())
		if err = errors.Join(append(errs, err)...); err == nil {
			err = remove()
		}
	}()
	newDaemon := func(name string, containers int) (*lab.Daemon, error) {
		d := &lab.Daemon{
			Binary: filepath.Join(env.BinDir, "workspaced"), Base: filepath.Join(dir, name), Own: containerd,
			Args: []string{"--containerd-namespace=bench-" + filepath.Base(dir) + "-" + name},
		}
		if err := os.Mkdir(d.Base, 0o755); err != nil {
			return nil, err
		}
		if err := d.Start(ctx); err != nil {
			return nil, err
		}
		daemons = append(daemons, d)
		return d, fillDaemon(ctx, env, d, containers)
	}
	full, err := newDaemon("full", size.containers)
	if err != nil {
		return nil, err
	}
	empty, err := newDaemon("none", 0)
	if err != nil {
		return nil, err
	}
	var ours, floor measure.Samples
	again := func(d *lab.Daemon, into *measure.Samples, containers int, step func()) func() error {
		return func() error {
			if err := d.Kill(); err != nil {
				return err
			}
			begin := time.Now()
			if err := d.Start(ctx); err != nil {
				return err
			}
			if step != nil {
				step()
			}
			if err := awaitWatched(ctx, d.PID(), containers); err != nil {
				return err
			}
			into.Add(time.Since(begin), time.Millisecond)
			return nil
		}
	}
	err = measure.Alternate(ctx, size.rounds, again(full, &ours, size.containers, step), again(empty, &floor, 0, nil))
	if err != nil {
		return nil, err
	}
	return []measure.Result{
		measure.Compare(fmt.Sprintf("idle/%d adopted", size.containers), "ms", ours, "the same daemon's start with none", floor, measure.MedianAtMost(1000)),
	}, nil
}

// fillDaemon has the daemon run so many containers.
func fillDaemon(ctx context.Context, env *Env, d *lab.Daemon, containers int) error {
	if containers == 0 {
		return nil
	}
	probe, err := env.program(probeProgram)
	if err != nil {
		return err
	}
	tar := filepath.Join(d.Base, "probe.tar")
	if err := writeProbeImage(probe, tar); err != nil {
		return err
	}
	args := d.Args
	if err := d.Stop(); err != nil {
		return err
	}
	d.Args = append(args[:len(args):len(args)], "--import-images="+tar)
	if err := d.Start(ctx); err != nil {
		return err
	}
	d.Args = args
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(32)
	for i := range containers {
		group.Go(func() error {
			id := fmt.Sprintf("w-%d", i)
			_, err := d.Client().CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{
				WorkspaceId: id,
				Workspace:   &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: probeImage, Args: []string{"/dev/null"}}},
			})
			if err != nil {
				return err
			}
			_, err = d.Client().WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/" + id})
			return err
		})
	}
	return group.Wait()
}

// awaitWatched waits until the process holds so many processes, which is how it
// watches containers for their end. Some it holds for a moment only, so it is asked
// twice.
func awaitWatched(ctx context.Context, pid, containers int) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for seen := 0; seen < 2; {
		n, err := pidfdsOf(pid)
		if err != nil {
			return err
		}
		if seen++; n != containers {
			seen = 0
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("the daemon watches %d processes, not %d: %w", n, containers, err)
		}
	}
	return nil
}

// pidfdsOf counts a process's files that are processes.
func pidfdsOf(pid int) (n int, err error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		target, err := os.Readlink(filepath.Join(dir, f.Name()))
		if err == nil && strings.Contains(target, "pidfd") { // it may be closed by now
			n++
		}
	}
	return n, nil
}
