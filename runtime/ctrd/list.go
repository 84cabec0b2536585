package ctrd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"golang.org/x/sync/errgroup"

	"github.com/workspaced/workspaced/runtime"
)

// listConcurrency bounds how many instances are looked at at once.
const listConcurrency = 16

// found is an instance that containerd knows, or that has a directory, or both.
type found struct {
	id        string
	uid       string // the workspace's, of one that has a directory
	container *containers.Container
	record    *record
	err       error // the record could not be read
}

func (f *found) created() time.Time {
	switch {
	case f.record != nil:
		return f.record.CreateTime
	case f.container != nil:
		return f.container.CreatedAt
	}
	return time.Time{}
}

// List returns the instances; see server/workspace.Runtime. Any error of
// containerd's is returned: what could not be asked for is not gone. One instance
// that can't be asked, as when its shim hangs, hides no other. Of a workspace's
// instances that are all on record containerd is asked once, for it looks through
// every container that it has.
func (d *Driver) List(ctx context.Context, uid string) ([]runtime.Instance, error) {
	ctx, cancel := d.bound(ctx, d.deadlines.list)
	defer cancel()
	instances, err := d.list(ctx, uid)
	return instances, failure(ctx, "listing the containers", err)
}

func (d *Driver) list(ctx context.Context, uid string) ([]runtime.Instance, error) {
	// Directories first: one is made before its container, and removed after it.
	recorded, err := d.recorded(uid)
	if err != nil {
		return nil, err
	}
	var list []containers.Container
	if uid == "" || !d.allRecorded(uid, recorded) {
		filter := fmt.Sprintf("labels.%q==%q", labelInstanceUID, d.cfg.InstanceUID)
		if uid != "" {
			filter += fmt.Sprintf(",labels.%q==%q", labelWorkspaceUID, uid)
		}
		if list, err = d.containers(ctx, filter); err != nil {
			return nil, err
		}
		d.noteRecorded(uid, recorded, list)
	}
	all := make(map[string]*found, len(list))
	for i := range list {
		all[list[i].ID] = &found{id: list[i].ID, container: &list[i]}
	}
	for _, r := range recorded {
		if f := all[r.id]; f != nil {
			r.container = f.container
		}
		all[r.id] = r
	}
	sorted := make([]*found, 0, len(all))
	for _, f := range all {
		sorted = append(sorted, f)
	}
	slices.SortFunc(sorted, func(a, b *found) int {
		return cmp.Or(a.created().Compare(b.created()), cmp.Compare(a.id, b.id))
	})

	instances, errs := make([]runtime.Instance, len(sorted)), make([]error, len(sorted))
	var group errgroup.Group
	group.SetLimit(listConcurrency)
	for i, f := range sorted {
		group.Go(func() error {
			errs[i] = d.guard("a look at a container", func() (err error) {
				ctx, cancel := context.WithTimeout(ctx, d.deadlines.inspect)
				defer cancel()
				instances[i], err = d.inspect(ctx, f)
				return err
			})
			if errs[i] != nil {
				instances[i] = f.instance()
				instances[i].Phase = runtime.PhaseUnknown
			}
			return nil
		})
	}
	_ = group.Wait() // each error has its instance
	return instances, unasked(instances, errs)
}

// allRecorded tells whether containerd can have no instance of the workspace but
// those on record: when it was asked it had none, all that this process has made
// since had a directory first, and each directory and record is still there.
func (d *Driver) allRecorded(uid string, recorded []*found) bool {
	ids := make(map[string]bool, len(recorded))
	for _, f := range recorded {
		if f.record == nil {
			return false
		}
		ids[f.id] = true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	known, asked := d.recordedOf[uid]
	for id := range known {
		if !ids[id] {
			return false
		}
	}
	return asked
}

// noteRecorded keeps what containerd's answer means for allRecorded. An answer
// about all workspaces only shows what is not on record.
func (d *Driver) noteRecorded(uid string, recorded []*found, list []containers.Container) {
	ids := make(map[string]bool, len(recorded))
	for _, f := range recorded {
		ids[f.id] = true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if uid != "" {
		d.recordedOf[strings.Clone(uid)] = ids
	}
	for i := range list {
		if !ids[list[i].ID] {
			delete(d.recordedOf, list[i].Labels[labelWorkspaceUID])
		}
	}
}

// forgetRecorded has the next List of the workspace ask containerd.
func (d *Driver) forgetRecorded(uid string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.recordedOf, uid)
}

// unasked makes one error of those that instances gave.
func unasked(instances []runtime.Instance, errs []error) error {
	failed := 0
	var first error
	for i, err := range errs {
		if err == nil {
			continue
		}
		if failed++; failed == 1 {
			first = fmt.Errorf("instance %s: %w", instances[i].ID, err)
		}
	}
	if failed > 1 {
		return fmt.Errorf("%d of %d containers could not be asked, the first: %w", failed, len(instances), first)
	}
	return first
}

// instance is what is known of it without a question.
func (f *found) instance() runtime.Instance {
	if f.record != nil {
		return f.record.instance(runtime.PhaseRemnant)
	}
	in := runtime.Instance{ID: f.id, WorkspaceUID: f.uid, Phase: runtime.PhaseRemnant}
	if c := f.container; c != nil {
		in.PreparedGeneration, _ = strconv.ParseInt(c.Labels[labelGeneration], 10, 64)
		in.WorkspaceID = c.Labels[labelWorkspaceID]
		if uid := c.Labels[labelWorkspaceUID]; uid != "" {
			in.WorkspaceUID = uid
		}
		in.ImageDigest = c.Labels[labelImageDigest]
	}
	return in
}

// Foreign counts containers of others; see server/workspace.Runtime.
func (d *Driver) Foreign(ctx context.Context) (map[string]int, error) {
	ctx, cancel := d.bound(ctx, d.deadlines.list)
	defer cancel()
	list, err := d.containers(ctx, fmt.Sprintf("labels.%q!=%q", labelInstanceUID, d.cfg.InstanceUID))
	if err != nil {
		return nil, failure(ctx, "listing the containers of others", err)
	}
	foreign := make(map[string]int)
	for _, c := range list {
		foreign[c.Labels[labelInstanceUID]]++
	}
	return foreign, nil
}

func (d *Driver) containers(ctx context.Context, filter string) (list []containers.Container, err error) {
	err = d.step(ctx, stepContainerList, func(ctx context.Context) (err error) {
		list, err = d.client.ContainerService().List(ctx, filter)
		return err
	})
	return list, err
}

// recorded returns the instances that have a directory, with their records: the
// workspace's, which costs nothing for the others, or all when uid is empty.
func (d *Driver) recorded(uid string) ([]*found, error) {
	uids := []string{uid}
	if uid == "" {
		var err error
		if uids, err = d.recordedUIDs(); err != nil {
			return nil, err
		}
	} else if !workspaceUID.MatchString(uid) {
		return nil, nil
	}
	var all []*found
	for _, uid := range uids {
		ids, err := d.recordedIDs(uid)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			f := &found{id: id, uid: uid}
			f.record, f.err = d.readRecordOrNone(uid, id)
			all = append(all, f)
		}
	}
	return all, nil
}

// inspect finds the instance's phase. The process tells whether it lives, its
// executable whether it is the command, and the record with what it was started.
func (d *Driver) inspect(ctx context.Context, f *found) (runtime.Instance, error) {
	if f.err != nil {
		return runtime.Instance{}, f.err
	}
	if f.record == nil {
		return d.inspectUnrecorded(ctx, f)
	}
	rec := f.record
	if rec.PID == 0 {
		return rec.instance(runtime.PhaseRemnant), nil // it did not come to a process
	}
	p, err := d.openProcess(ctx, rec.PID, rec.PIDStart)
	if err != nil {
		return runtime.Instance{}, err
	}
	if p != nil {
		defer p.close()
	}
	if p != nil && !p.ended() {
		phase, err := d.livePhase(ctx, rec, p)
		if phase == runtime.PhaseRunning {
			// Those of one that an earlier daemon started with its last breath.
			if err := d.dropHandshake(rec); err != nil {
				d.log.Warn("FIFOs not removed, they go with the instance", "instance", rec.ID, "error", err)
			}
		}
		if err != nil || phase != runtime.PhaseExited {
			return rec.instance(phase), err
		}
	}
	if rec.Launch == nil {
		return rec.instance(runtime.PhaseRemnant), nil
	}
	instance := rec.instance(runtime.PhaseExited)
	if rec.Exit == nil {
		// containerd has to say so itself; its silence is no answer.
		if _, err := d.task(ctx, rec.ID); err != nil {
			return runtime.Instance{}, err
		}
		exit := d.exit(ctx, rec, p)
		instance.Exit = &exit
		return instance, nil
	}
	instance.Exit = rec.Exit
	return instance, nil
}

// settleTime is how long List waits for an init that has a go-ahead to become the
// command, or to end, also after the daemon that sent it died.
const settleTime = 2 * time.Second

// livePhase tells what a living process is; PhaseExited if it ended meanwhile. One
// that is ending is waited for: whether it had become the command can't be told
// from it any more.
func (d *Driver) livePhase(ctx context.Context, rec *record, p *process) (runtime.Phase, error) {
	begin := time.Now()
	for {
		executable, err := executableOf(rec.PID)
		ending := errors.Is(err, os.ErrNotExist)
		switch {
		case p.ended():
			return runtime.PhaseExited, nil
		case d.holds(rec.ID):
			return runtime.PhaseStandby, nil
		case rec.Launch == nil:
			return runtime.PhaseRemnant, nil
		case err != nil && !ending:
			return runtime.PhaseRemnant, err
		case !ending && executable != rec.Init:
			return runtime.PhaseRunning, nil
		case !ending && time.Since(begin) > settleTime:
			return runtime.PhaseRemnant, nil
		}
		select {
		case <-ctx.Done():
			return runtime.PhaseRemnant, ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// inspectUnrecorded looks at an instance that has no record: the tmpfs is gone,
// as after a reboot, or the record is damaged, or was not written yet.
func (d *Driver) inspectUnrecorded(ctx context.Context, f *found) (runtime.Instance, error) {
	instance := f.instance()
	if f.container == nil {
		return instance, nil
	}
	t, err := d.task(ctx, f.id)
	if err != nil {
		return runtime.Instance{}, err
	}
	if t == nil || t.Pid == 0 || (t.Status != tasktypes.Status_RUNNING && t.Status != tasktypes.Status_PAUSED) {
		return instance, nil
	}
	// With what it was started nobody knows, but it may run.
	if executable, err := executableOf(int(t.Pid)); err == nil && executable != d.initID {
		instance.Phase, instance.PID = runtime.PhaseRunning, int(t.Pid)
	}
	return instance, nil
}
