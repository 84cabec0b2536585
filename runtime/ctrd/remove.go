package ctrd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
)

// Remove removes an instance; see server/workspace.Runtime. Its directory goes
// last: until then the instance can be found and removed again.
func (d *Driver) Remove(ctx context.Context, id string) error {
	if !instanceID.MatchString(id) {
		return nil
	}
	ctx, cancel := d.bound(ctx, d.deadlines.remove)
	defer cancel()
	d.dropNamespaces(ctx, id)
	defer d.dropNamespaces(ctx, id) // of a stop meanwhile
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
		if err := d.endRecorded(ctx, rec); err != nil {
			return err
		}
	}
	err = d.step(ctx, stepStandbyDrop, func(context.Context) error {
		d.dropStandby(id)
		return nil
	})
	if err != nil {
		return err
	}
	interrupted := rec == nil || rec.PID == 0 || rec.Removing
	if !interrupted {
		if _, err := d.updateRecord(ctx, stepRecordRemoving, rec, func(r *record) { r.Removing = true }); err != nil {
			// No room for it, perhaps, which a removal makes.
			d.log.Warn("removal not recorded", "instance", id, "error", err)
			interrupted = true
		}
	}
	deleted := false
	if !interrupted {
		if deleted, err = d.deleteEnded(ctx, id); err != nil {
			return err
		}
	}
	if !deleted {
		if err := d.deleteTask(ctx, id); err != nil {
			return err
		}
	}
	if interrupted {
		if err := d.step(ctx, stepShimEnd, func(ctx context.Context) error { return d.endOrphanShims(ctx, id) }); err != nil {
			return err
		}
		if err := d.step(ctx, stepBundleRemove, func(context.Context) error { return d.removeBundle(id) }); err != nil {
			return err
		}
	}
	if err := d.step(ctx, stepSocketsRemove, func(context.Context) error { return d.removeShimSockets(id) }); err != nil {
		return err
	}
	workspace, err := d.removeContainer(ctx, id, rec)
	if err != nil {
		return err
	}
	// What runc leaves when its shim was killed in the middle.
	err = d.step(ctx, stepRuncRemove, func(context.Context) error {
		return os.RemoveAll(filepath.Join(d.runcRoot, d.cfg.Namespace, id))
	})
	if err != nil {
		return err
	}
	if workspaceID.MatchString(workspace) {
		path := d.cgroupPath(workspace, id)
		err := d.step(ctx, stepCgroupRemove, func(ctx context.Context) error {
			if err := d.removeCgroup(ctx, path); err != nil {
				return err
			}
			// Of a workspace that nobody knows, no one else removes it.
			d.removeEmptyCgroup(filepath.Dir(path))
			return nil
		})
		if err != nil {
			return err
		}
	}
	if uid == "" {
		return nil
	}
	return d.step(ctx, stepInstanceRemove, func(context.Context) error { return d.removeInstanceDir(uid, id) })
}

// endRecorded kills the first process, if it lives.
func (d *Driver) endRecorded(ctx context.Context, rec *record) error {
	p, err := d.openProcess(ctx, rec.PID, rec.PIDStart)
	if p == nil || err != nil {
		return err
	}
	defer p.close()
	d.markStopping(ctx, rec, p)
	return d.killProcess(ctx, p)
}

// removeContainer removes what containerd keeps of the instance beside its task,
// and returns the workspace's id if it is known.
func (d *Driver) removeContainer(ctx context.Context, id string, rec *record) (workspace string, err error) {
	snapshotter := d.cfg.Snapshotter
	if rec != nil {
		workspace = rec.WorkspaceID
	}
	if rec != nil && rec.Snapshotter != "" {
		snapshotter = rec.Snapshotter
	} else if c, err := d.container(ctx, id); err == nil {
		snapshotter, workspace = c.Snapshotter, c.Labels[labelWorkspaceID]
	} else if !errdefs.IsNotFound(err) {
		return "", err
	}
	err = d.step(ctx, stepContainerDelete, func(ctx context.Context) error {
		return d.client.ContainerService().Delete(ctx, id)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	err = d.step(ctx, stepSnapshotRemove, func(ctx context.Context) error {
		return d.client.SnapshotService(snapshotter).Remove(ctx, id)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	return workspace, nil
}

// killTask kills what containerd knows of the instance and waits for its end.
func (d *Driver) killTask(ctx context.Context, id string) error {
	return d.endTask(ctx, id, false)
}

func (d *Driver) deleteTask(ctx context.Context, id string) error {
	return d.endTask(ctx, id, true)
}

// endedTries bounds how often the deletion of a task that has ended is tried
// before containerd is asked in what state it is: within 255 ms.
const endedTries = 8

// deleteEnded deletes the task of a process that has ended, as we know. Its shim
// may see the end a moment later and refuse until then: no reason to have it run
// the OCI runtime for one more kill. deleted is false if it goes on refusing.
func (d *Driver) deleteEnded(ctx context.Context, id string) (deleted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.deadlines.kill)
	defer cancel()
	wait := time.Millisecond
	for range endedTries {
		err := d.deleteTaskNow(ctx, id)
		if err == nil || errdefs.IsNotFound(err) {
			return true, nil
		}
		if unavailable(err) || d.ctx.Err() != nil {
			return false, err
		}
		select {
		case <-ctx.Done():
			return false, errors.Join(ctx.Err(), err)
		case <-time.After(wait):
		}
		wait *= 2
	}
	return false, nil
}

func (d *Driver) deleteTaskNow(ctx context.Context, id string) error {
	return d.step(ctx, stepTaskDelete, func(ctx context.Context) error {
		_, err := d.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
		return errgrpc.ToNative(err)
	})
}

// endTask brings the task to its end, and deletes it when remove is set. The
// task may be in any state, also half made; there may be none.
func (d *Driver) endTask(ctx context.Context, id string, remove bool) error {
	ctx, cancel := d.bound(ctx, d.deadlines.kill)
	defer cancel()
	var last error
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		t, err := d.task(ctx, id)
		silent := remove && errors.Is(err, errShimSilent) // dead, perhaps: then it can be deleted
		switch {
		case err != nil && !silent:
			last = err
		case t == nil && !silent:
			return nil
		case silent || t.Status == tasktypes.Status_STOPPED || t.Pid == 0:
			if !remove {
				return nil
			}
			err := d.deleteTaskNow(ctx, id)
			if err == nil || errdefs.IsNotFound(err) {
				return nil
			}
			last = err
		default:
			err := d.step(ctx, stepTaskKill, func(ctx context.Context) error {
				_, err := d.client.TaskService().Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(unix.SIGKILL), All: true})
				return errgrpc.ToNative(err)
			})
			if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
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
