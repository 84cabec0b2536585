package ctrd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// armed is a launch with all that can be made of it before it is due.
type armed struct {
	launch  runtime.Launch
	goAhead []byte
}

// Arm makes a standby's launch ready; see server/workspace.Runtime.
func (d *Driver) Arm(ctx context.Context, id string, launch runtime.Launch) error {
	s := d.take(id)
	if s == nil {
		return d.notStandby(ctx, id)
	}
	defer d.giveBack(s)
	ctx, cancel := d.bound(ctx, d.deadlines.start)
	defer cancel()
	if s.process.ended() {
		return s.interrupted(runtime.Resources{})
	}
	err := d.arm(ctx, s, launch)
	if err == nil {
		err = d.step(ctx, stepRecordArm, func(context.Context) error { return d.recordAhead(s) })
	}
	return failure(ctx, "making the start ready", err)
}

// arm checks the launch and makes what it needs.
func (d *Driver) arm(ctx context.Context, s *standby, launch runtime.Launch) error {
	s.armed = nil
	d.recordMu.Lock()
	s.ahead = false
	d.recordMu.Unlock()
	env := mergeEnv(s.imageEnv, launch.Env)
	if err := checkEnv(env, s.argv); err != nil {
		return err
	}
	if err := checkFiles(launch.Files, nil); err != nil {
		return err
	}
	if err := d.giveFiles(ctx, s, launch.Files); err != nil {
		return err
	}
	goAhead, err := handshake.Block(handshake.GoAhead{Argv: s.argv, Env: env})
	if err != nil {
		return err
	}
	s.armed = &armed{launch, goAhead}
	return nil
}

// record is what is to be on record of it.
func (a *armed) record(files []string) *launchRecord {
	return &launchRecord{
		Generation: a.launch.Generation, SecretVersions: a.launch.SecretVersions, GlobalSecrets: a.launch.GlobalSecrets, Files: files,
	}
}

// Start makes a standby instance the command; see server/workspace.Runtime.
// Nothing is asked of containerd.
func (d *Driver) Start(ctx context.Context, id string, launch runtime.Launch) (runtime.Instance, error) {
	s := d.take(id)
	if s == nil {
		return runtime.Instance{}, d.notStandby(ctx, id)
	}
	defer d.dropStandby(id)
	ctx, cancel := d.bound(ctx, d.deadlines.start)
	defer cancel()
	started := false
	defer func() {
		if !started {
			d.undoStart(ctx, s)
		}
	}()
	if err := d.launch(ctx, s, launch); err != nil {
		return runtime.Instance{}, failure(ctx, "starting the command", err)
	}
	started = true
	return s.record.instance(runtime.PhaseRunning), nil
}

// undoStart sees to it that an instance does not start later: the go-ahead may
// lie in the pipe already.
func (d *Driver) undoStart(ctx context.Context, s *standby) {
	ctx, cancel := d.detached(ctx, d.deadlines.kill)
	defer cancel()
	if err := d.killProcess(ctx, s.process); err != nil {
		d.log.Error("instance not killed after a failed start", "instance", s.record.ID, "error", err)
		return
	}
	if _, err := d.updateRecord(ctx, stepRecordUndo, s.record, func(r *record) { r.Launch = nil }); err != nil {
		d.log.Warn("instance record not written", "instance", s.record.ID, "error", err)
	}
}

func (d *Driver) launch(ctx context.Context, s *standby, launch runtime.Launch) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.armed == nil || !s.armed.launch.Equal(launch) {
		// A change came in between, or nobody has armed it.
		if err := d.arm(ctx, s, launch); err != nil {
			return err
		}
	}
	if err := d.recordLaunch(ctx, s); err != nil {
		return err
	}
	err := d.step(ctx, stepFIFOWrite, s.writeGoAhead)
	if errors.Is(err, unix.EPIPE) {
		return s.interrupted(runtime.Resources{})
	} else if err != nil {
		return err
	}
	if err := d.step(ctx, stepInitResult, s.awaitExec); err != nil {
		return err
	}
	// The command runs, and has inherited neither FIFO. Nobody opens them again.
	if err := d.step(ctx, stepFIFORemove, func(context.Context) error { return d.dropHandshake(s.record) }); err != nil {
		d.log.Warn("FIFOs not removed, they go with the instance", "instance", s.record.ID, "error", err)
	}
	return nil
}

// giveFiles puts the files into place, unless they are there. Others go first, for
// nobody reads yet, and there may be no room for both.
func (d *Driver) giveFiles(ctx context.Context, s *standby, files []runtime.File) error {
	if s.placed && slices.EqualFunc(files, s.files, runtime.File.Equal) {
		return nil
	}
	others := !s.placed || len(s.files) > 0
	s.placed = false
	if others {
		if err := removeAllIn(d.filesDir(s.record.WorkspaceUID, s.record.ID)); err != nil {
			return err
		}
	}
	names, err := d.putFiles(ctx, s.record, files, nil)
	if err != nil {
		return err
	}
	s.placed, s.files, s.names = true, files, names
	return nil
}

func removeAllIn(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// recordAhead writes the record that the instance will have once it is started
// beside the one that it has. Where there is no room for it Start has to write its
// record, for which there is: see makeReserve.
func (d *Driver) recordAhead(s *standby) error {
	d.recordMu.Lock()
	defer d.recordMu.Unlock()
	rec, err := d.readRecord(s.record.WorkspaceUID, s.record.ID)
	if err == nil && rec == nil {
		err = s.unrecorded()
	}
	if err != nil {
		return err
	}
	rec.Launch = s.armed.record(s.names)
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	path := filepath.Join(d.instanceDir(rec.WorkspaceUID, rec.ID), armedFile)
	err = os.WriteFile(path, b, 0o600)
	if errors.Is(err, unix.ENOSPC) {
		return ignoreMissing(os.Remove(path))
	}
	s.ahead = err == nil
	return err
}

// recordLaunch puts on record with what the instance is started.
func (d *Driver) recordLaunch(ctx context.Context, s *standby) error {
	s.record.Launch = s.armed.record(s.names)
	return d.step(ctx, stepRecordLaunch, func(context.Context) error {
		d.recordMu.Lock()
		defer d.recordMu.Unlock()
		if s.ahead {
			s.ahead = false
			dir := d.instanceDir(s.record.WorkspaceUID, s.record.ID)
			at, err := putIntoPlace(filepath.Join(dir, armedFile), filepath.Join(dir, recordFile))
			s.record.Launch.StartTime = at
			return err
		}
		s.record.Launch.StartTime = time.Now()
		written, err := d.changeRecord(s.record, func(r *record) { r.Launch = s.record.Launch })
		if err == nil && written == nil {
			err = s.unrecorded()
		}
		return err
	})
}

// putIntoPlace renames a file, and returns when, as the file itself says from then on.
func putIntoPlace(from, to string) (at time.Time, err error) {
	if err := os.Rename(from, to); err != nil {
		return time.Time{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(to, &st); err != nil {
		return time.Time{}, &os.PathError{Op: "stat", Path: to, Err: err}
	}
	return changeTime(&st), nil
}

func (s *standby) unrecorded() error {
	return fmt.Errorf("instance %s has no record any more", s.record.ID)
}

func (s *standby) writeGoAhead(ctx context.Context) error {
	return interruptible(ctx, s.goAhead, func() error {
		_, err := s.goAhead.Write(s.armed.goAhead)
		return err
	})
}

// execTime is how long after its go-ahead init is looked at. A look wakes whenever
// there is something to see: the first time on the very processor on which the
// command is about to begin.
const execTime = 2 * time.Millisecond

// awaitExec returns once init has become the command.
func (s *standby) awaitExec(ctx context.Context) error {
	select {
	case <-time.After(execTime):
	case <-ctx.Done():
		return ctx.Err()
	}
	executing := false
	var failed *runtime.Error
	for {
		res, err := s.readResult(ctx)
		switch {
		case errors.Is(err, io.EOF) && failed != nil:
			return failed
		case errors.Is(err, io.EOF) && executing:
			return nil
		case errors.Is(err, io.EOF):
			return s.interrupted(runtime.Resources{})
		case err != nil:
			return err
		case res.Kind == handshake.Failed && res.Message == "":
			failed = refusal(res) // in words it comes yet, unless that fails too
		case res.Kind == handshake.Failed:
			return refusal(res)
		case res.Kind == handshake.Executing:
			executing = true
		}
	}
}

// dropHandshake removes what only a standby needs, as far as it is there.
func (d *Driver) dropHandshake(rec *record) error {
	errs := []error{d.dropReserve(rec)}
	for _, path := range []string{
		filepath.Join(d.instanceDir(rec.WorkspaceUID, rec.ID), armedFile),
		filepath.Join(d.ioDir(rec.WorkspaceUID, rec.ID), handshake.GoAheadName),
		filepath.Join(d.ioDir(rec.WorkspaceUID, rec.ID), handshake.ResultName),
	} {
		errs = append(errs, ignoreMissing(os.Remove(path)))
	}
	return errors.Join(errs...)
}

// notStandby tells why an instance can't be started.
func (d *Driver) notStandby(ctx context.Context, id string) error {
	if err := d.exists(ctx, id); err != nil {
		return err
	}
	return &runtime.Error{
		Reason: runtime.ReasonStartInterrupted, Message: "instance " + id + " is no standby of this daemon process", Permanent: true,
	}
}
