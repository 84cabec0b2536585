package ctrd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
)

// Stop ends an instance; see server/workspace.Runtime. It asks containerd
// nothing about an instance that has a record.
func (d *Driver) Stop(ctx context.Context, id string, signal syscall.Signal, grace time.Duration) error {
	rec, err := d.findRecord(ctx, id)
	if err != nil {
		return failure(ctx, "stopping the container", err)
	}
	if rec == nil || rec.PID == 0 {
		// Known to containerd alone: there is no command that could end with grace.
		return failure(ctx, "stopping the container", d.killTask(ctx, id))
	}
	p, err := d.openProcess(ctx, rec.PID, rec.PIDStart)
	if err != nil {
		return failure(ctx, "stopping the container", err)
	}
	if p == nil {
		return nil
	}
	defer p.close()
	if rec.Launch == nil {
		// Init waits for a go-ahead and has nothing to end.
		grace = 0
	}
	d.markStopping(ctx, rec, p)
	d.holdNamespaces(id, p)
	return failure(ctx, "stopping the container", d.stopProcess(ctx, p, signal, grace))
}

// markStopping puts on record that it is us who end the process, unless it has
// ended. Where that fails it is ended all the same.
func (d *Driver) markStopping(ctx context.Context, rec *record, p *process) {
	if rec.Stopping || p.ended() {
		return
	}
	if _, err := d.updateRecord(ctx, stepRecordStopping, rec, func(r *record) { r.Stopping = true }); err != nil {
		d.log.Warn("stop not recorded", "instance", rec.ID, "error", err)
	}
}

// heldNamespaces are those that the last process of a container takes along.
var heldNamespaces = []string{"mnt", "ipc", "uts", "cgroup"}

// holdNamespaces keeps the namespaces of an instance that is about to end until it is
// removed. To take them down takes the kernel long, mounts above all, and the
// process's end is not seen before. What lies in a tmpfs of the container's, or in
// shared memory that its processes have not removed, takes its memory until then.
func (d *Driver) holdNamespaces(id string, p *process) {
	var files []*os.File
	for _, name := range heldNamespaces {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", p.pid, name))
		if err != nil {
			continue // it has ended, or the kernel has no such namespaces: it takes longer then
		}
		files = append(files, f)
	}
	d.mu.Lock()
	// Its pid is no other process's as long as it has not ended.
	mine := len(files) > 0 && !p.ended() && !d.closed && d.held[id] == nil
	if mine {
		d.held[id] = files
	}
	d.mu.Unlock()
	if !mine {
		closeAll(files)
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// dropNamespaces lets go of what holdNamespaces keeps, and waits until it has gone
// or ctx ends: a file system that does not answer can take for ever.
func (d *Driver) dropNamespaces(ctx context.Context, id string) {
	d.mu.Lock()
	files := d.held[id]
	delete(d.held, id)
	d.mu.Unlock()
	if files == nil {
		return
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		closeAll(files)
	}()
	select {
	case <-gone:
	case <-ctx.Done():
		d.log.WarnContext(ctx, "the namespaces of an instance take long to go", "instance", id)
	}
}

// stopProcess signals, waits for the grace period, kills, and waits.
func (d *Driver) stopProcess(ctx context.Context, p *process, signal syscall.Signal, grace time.Duration) error {
	if grace > 0 {
		if signal == 0 {
			signal = syscall.SIGTERM
		}
		if err := d.signal(ctx, p, signal); err != nil {
			return err
		}
		gctx, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		err := d.step(gctx, stepPidfdWait, p.wait)
		if err == nil || ctx.Err() != nil || gctx.Err() == nil {
			return err // it has ended, or nobody knows: the grace is not over
		}
	}
	return d.killProcess(ctx, p)
}

func (d *Driver) signal(ctx context.Context, p *process, signal syscall.Signal) error {
	return d.step(ctx, stepPidfdSignal, func(context.Context) error { return p.signal(signal) })
}

func (d *Driver) killProcess(ctx context.Context, p *process) error {
	kctx, cancel := context.WithTimeout(ctx, d.deadlines.kill)
	defer cancel()
	if err := d.signal(kctx, p, unix.SIGKILL); err != nil {
		return err
	}
	err := d.step(kctx, stepPidfdWait, p.wait)
	if err != nil && ctx.Err() == nil && kctx.Err() != nil {
		return &runtime.Error{Reason: runtime.ReasonTimeout, Message: "the container's first process does not end, not even by SIGKILL", Err: err}
	}
	return err
}

// findRecord returns the instance's record; nil when containerd knows the
// instance and we have none, runtime.ErrNotFound when nobody knows it.
func (d *Driver) findRecord(ctx context.Context, id string) (*record, error) {
	if !instanceID.MatchString(id) {
		return nil, runtime.ErrNotFound
	}
	uid, err := d.owner(id)
	if err != nil {
		return nil, err
	}
	if uid != "" {
		rec, err := d.readRecordOrNone(uid, id)
		if rec != nil || err != nil {
			return rec, err
		}
	}
	return nil, d.exists(ctx, id)
}

// exists returns runtime.ErrNotFound when there is definitely no such instance.
func (d *Driver) exists(ctx context.Context, id string) error {
	if !instanceID.MatchString(id) {
		return runtime.ErrNotFound
	}
	uid, err := d.owner(id)
	if err != nil {
		return err
	}
	if uid != "" {
		if _, err := os.Lstat(d.instanceDir(uid, id)); err == nil {
			return nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	ctx, cancel := d.bound(ctx, d.deadlines.list)
	defer cancel()
	_, err = d.container(ctx, id)
	if errdefs.IsNotFound(err) {
		return runtime.ErrNotFound
	}
	return failure(ctx, "asking for the container", err)
}

// container returns containerd's record of the instance.
func (d *Driver) container(ctx context.Context, id string) (c containers.Container, err error) {
	err = d.step(ctx, stepContainerGet, func(ctx context.Context) (err error) {
		c, err = d.client.ContainerService().Get(ctx, id)
		return err
	})
	return c, err
}

// recordOfTask makes a record for an instance that containerd alone knows.
func (d *Driver) recordOfTask(ctx context.Context, id string) (*record, error) {
	rec := &record{ID: id}
	p, err := d.task(ctx, id)
	if err != nil || p == nil {
		return rec, err
	}
	rec.PID = int(p.Pid)
	if rec.PIDStart, err = startTime(rec.PID); err != nil {
		rec.PID = 0 // it has ended
	}
	return rec, nil
}

// errShimSilent: the task's shim does not answer containerd, which knows nothing
// then. Version 1.6 does not call that an error.
var errShimSilent = errors.New("the container's shim does not answer")

// task returns what containerd says of the instance's process; nil when there
// is definitely none.
func (d *Driver) task(ctx context.Context, id string) (*tasktypes.Process, error) {
	ctx, cancel := d.bound(ctx, d.deadlines.task)
	defer cancel()
	var res *tasks.GetResponse
	err := d.step(ctx, stepTaskGet, func(ctx context.Context) (err error) {
		res, err = d.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
		return errgrpc.ToNative(err)
	})
	if errdefs.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if res.Process.Status == tasktypes.Status_UNKNOWN {
		return nil, errShimSilent
	}
	return res.Process, nil
}

// exitTries bounds how long the exit code is looked for: the shim has it some
// milliseconds after the process's end.
const (
	exitTries    = 40
	exitInterval = 5 * time.Millisecond
)

// exit finds out how a process that is gone ended. What it finds is kept in the
// record; an exit that can't be found out is unknown.
func (d *Driver) exit(ctx context.Context, rec *record, p *process) runtime.Exit {
	ctx, cancel := d.detached(ctx, d.deadlines.exit)
	defer cancel()
	exit := runtime.Exit{Time: time.Now()}
	err := d.step(ctx, stepExitStatus, func(ctx context.Context) error {
		exit = d.exitStatus(ctx, rec, p)
		return nil
	})
	if err != nil {
		d.log.Warn("exit not found out", "instance", rec.ID, "error", err)
	}
	if !exit.Known {
		return exit
	}
	rec.Exit = &exit
	if rec.WorkspaceUID == "" {
		return exit // it has no record
	}
	if _, err := d.updateRecord(ctx, stepRecordExit, rec, func(r *record) { r.Exit = &exit }); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("exit not recorded", "instance", rec.ID, "error", err)
	}
	return exit
}

// exitStatus is the kernel's word if p was open before the end and the kernel
// gives one, else containerd's.
func (d *Driver) exitStatus(ctx context.Context, rec *record, p *process) runtime.Exit {
	exit := runtime.Exit{Time: time.Now()}
	for try := range exitTries {
		if p != nil {
			if status, ok := p.exitStatus(); ok {
				exit.Known, exit.Code = true, status.ExitStatus()
				if status.Signaled() {
					exit.Signal = int(status.Signal())
					exit.Code = 128 + exit.Signal
				}
				break
			}
		}
		t, err := d.task(ctx, rec.ID)
		if err == nil && t == nil {
			break // containerd has forgotten it
		}
		if err == nil && t.Status == tasktypes.Status_STOPPED {
			exit.Known, exit.Code = true, int(t.ExitStatus)
			// A command that handles a signal may exit with 128 + signal itself; the
			// two can't be told apart here.
			if s := exit.Code - 128; s > 0 && s <= 64 {
				exit.Signal = s
			}
			if at := t.ExitedAt; at.IsValid() && !at.AsTime().IsZero() {
				exit.Time = at.AsTime()
			}
			break
		}
		select {
		case <-ctx.Done():
			return exit
		case <-time.After(exitInterval * time.Duration(1+try/8)):
		}
	}
	exit.OOMKilled = exit.Known && exit.Code == 128+int(unix.SIGKILL) && d.oomKills(d.cgroupPath(rec.WorkspaceID, rec.ID)) > 0
	return exit
}
