package ctrd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
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
	p, err := openProcess(rec.PID, rec.PIDStart)
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
	d.markStopping(rec, p)
	return failure(ctx, "stopping the container", stopProcess(ctx, p, signal, grace))
}

// markStopping puts on record that it is us who end the process, unless it has
// ended. Where that fails it is ended all the same.
func (d *Driver) markStopping(rec *record, p *process) {
	if rec.Stopping || p.ended() {
		return
	}
	if _, err := d.updateRecord(rec.WorkspaceUID, rec.ID, func(r *record) { r.Stopping = true }); err != nil {
		d.log.Warn("stop not recorded", "instance", rec.ID, "error", err)
	}
}

// stopProcess signals, waits for the grace period, kills, and waits.
func stopProcess(ctx context.Context, p *process, signal syscall.Signal, grace time.Duration) error {
	if grace > 0 {
		if signal == 0 {
			signal = syscall.SIGTERM
		}
		if err := p.signal(signal); err != nil {
			return err
		}
		gctx, cancel := context.WithTimeout(ctx, grace)
		err := p.wait(gctx)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	return killProcess(ctx, p)
}

func killProcess(ctx context.Context, p *process) error {
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	kctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	err := p.wait(kctx)
	if err != nil && ctx.Err() == nil {
		return &runtime.Error{Reason: runtime.ReasonTimeout, Message: "the container's first process does not end, not even by SIGKILL", Err: err}
	}
	return err
}

// Wait returns how an instance ended; see server/workspace.Runtime.
func (d *Driver) Wait(ctx context.Context, id string) (runtime.Exit, error) {
	rec, err := d.findRecord(ctx, id)
	if err != nil {
		return runtime.Exit{}, failure(ctx, "waiting for the container", err)
	}
	if rec == nil {
		if rec, err = d.recordOfTask(ctx, id); err != nil {
			return runtime.Exit{}, failure(ctx, "waiting for the container", err)
		}
	}
	if rec.Exit != nil {
		return *rec.Exit, nil
	}
	var p *process
	if rec.PID != 0 {
		if p, err = openProcess(rec.PID, rec.PIDStart); err != nil {
			return runtime.Exit{}, failure(ctx, "waiting for the container", err)
		}
	}
	if p != nil {
		defer p.close()
		if err := p.wait(ctx); err != nil {
			return runtime.Exit{}, failure(ctx, "waiting for the container", err)
		}
	}
	return d.exit(ctx, rec, p), nil
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
	ctx, cancel := d.bound(ctx, listTimeout)
	defer cancel()
	_, err = d.client.ContainerService().Get(ctx, id)
	if errdefs.IsNotFound(err) {
		return runtime.ErrNotFound
	}
	return failure(ctx, "asking for the container", err)
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

// task returns what containerd says of the instance's process; nil when there
// is definitely none.
func (d *Driver) task(ctx context.Context, id string) (*tasktypes.Process, error) {
	ctx, cancel := d.bound(ctx, taskTimeout)
	defer cancel()
	res, err := d.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil {
		if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
			return nil, nil
		}
		return nil, err
	}
	return res.Process, nil
}

// exitTries bounds how long the exit code is looked for: the shim has it some
// milliseconds after the process's end.
const (
	exitTries    = 40
	exitInterval = 5 * time.Millisecond
	exitTimeout  = 3 * time.Second
)

// exit finds out how a process that is gone ended: the kernel's word if p was
// open before the end and the kernel gives one, else containerd's. What it
// finds is kept in the record.
func (d *Driver) exit(ctx context.Context, rec *record, p *process) runtime.Exit {
	ctx, cancel := d.detached(ctx, exitTimeout)
	defer cancel()
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
	if exit.Known {
		exit.OOMKilled = exit.Code == 128+int(unix.SIGKILL) && d.oomKills(d.cgroupPath(rec.WorkspaceID, rec.ID)) > 0
		rec.Exit = &exit
		if rec.WorkspaceUID == "" {
			return exit // it has no record
		}
		if _, err := d.updateRecord(rec.WorkspaceUID, rec.ID, func(r *record) { r.Exit = &exit }); err != nil && !errors.Is(err, os.ErrNotExist) {
			d.log.Warn("exit not recorded", "instance", rec.ID, "error", err)
		}
	}
	return exit
}

// Remove removes an instance; see server/workspace.Runtime. Its directory goes
// last: until then the instance can be found and removed again.
func (d *Driver) Remove(ctx context.Context, id string) error {
	if !instanceID.MatchString(id) {
		return nil
	}
	ctx, cancel := d.bound(ctx, removeTimeout)
	defer cancel()
	return failure(ctx, "removing the container", d.remove(ctx, id))
}

func (d *Driver) remove(ctx context.Context, id string) error {
	uid, err := d.owner(id)
	if err != nil {
		return err
	}
	var rec *record
	if uid != "" {
		// A damaged record hides nothing that containerd does not know.
		if rec, err = d.readRecordOrNone(uid, id); err != nil {
			return err
		}
	}
	if rec != nil && rec.PID != 0 {
		p, err := openProcess(rec.PID, rec.PIDStart)
		if err != nil {
			return err
		}
		if p != nil {
			d.markStopping(rec, p)
			err = killProcess(ctx, p)
			p.close()
			if err != nil {
				return err
			}
		}
	}
	d.dropStandby(id)
	interrupted := rec == nil || rec.PID == 0 || rec.Removing
	if !interrupted {
		if _, err := d.updateRecord(uid, id, func(r *record) { r.Removing = true }); err != nil {
			return err
		}
	}
	if err := d.deleteTask(ctx, id); err != nil {
		return err
	}
	if interrupted {
		if err := d.endOrphanShims(ctx, id); err != nil {
			return err
		}
		if err := d.removeBundle(id); err != nil {
			return err
		}
	}
	if err := d.removeShimSockets(id); err != nil {
		return err
	}

	containers := d.client.ContainerService()
	snapshotter := d.cfg.Snapshotter
	workspace := ""
	if rec != nil {
		workspace = rec.WorkspaceID
	}
	if c, err := containers.Get(ctx, id); err == nil {
		snapshotter, workspace = c.Snapshotter, c.Labels[labelWorkspaceID]
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	if err := containers.Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := d.client.SnapshotService(snapshotter).Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	// What runc leaves when its shim was killed in the middle.
	if err := os.RemoveAll(filepath.Join(d.runcRoot, d.cfg.Namespace, id)); err != nil {
		return err
	}
	if workspaceID.MatchString(workspace) {
		if err := d.removeCgroup(ctx, d.cgroupPath(workspace, id)); err != nil {
			return err
		}
	}
	if uid == "" {
		return nil
	}
	return d.removeInstanceDir(uid, id)
}

// killTask kills what containerd knows of the instance and waits for its end.
func (d *Driver) killTask(ctx context.Context, id string) error {
	return d.endTask(ctx, id, false)
}

func (d *Driver) deleteTask(ctx context.Context, id string) error {
	return d.endTask(ctx, id, true)
}

// endTask brings the task to its end, and deletes it when remove is set. The
// task may be in any state, also half made; there may be none.
func (d *Driver) endTask(ctx context.Context, id string, remove bool) error {
	ctx, cancel := d.bound(ctx, killTimeout)
	defer cancel()
	service := d.client.TaskService()
	var last error
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		t, err := d.task(ctx, id)
		switch {
		case err != nil:
			last = err
		case t == nil:
			return nil
		case t.Status == tasktypes.Status_STOPPED || t.Pid == 0:
			if !remove {
				return nil
			}
			_, err := service.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
			if err = errgrpc.ToNative(err); err == nil || errdefs.IsNotFound(err) {
				return nil
			}
			last = err
		default:
			_, err := service.Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(unix.SIGKILL), All: true})
			if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
				last = err
			}
		}
		if last != nil && (unavailable(last) || d.ctx.Err() != nil) {
			return last
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), last)
		case <-time.After(wait):
		}
	}
}
