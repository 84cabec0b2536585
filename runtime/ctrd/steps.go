package ctrd

import (
	"context"
	"errors"
)

// The steps, in the order of a cycle. What an effect does to the world, and what
// it waits for, passes Config.Around under one of these names; some are within
// others. Each is bounded by a deadline.
const (
	// EnsureImage.
	stepLeaseCreate  = "lease.create"  // keep containerd's garbage collector off what is made
	stepImageGet     = "image.get"     // ask containerd for the image
	stepSnapshotStat = "snapshot.stat" // and for its snapshot, if it was there before
	stepImageFetch   = "image.fetch"   // the whole pull
	stepImageResolve = "image.resolve" // ask the registry for the digest; within the pull
	stepImageUnpack  = "image.unpack"  // make its snapshots
	stepLeaseDelete  = "lease.delete"

	// ImportImage.
	stepImageImport = "image.import"

	// Prepare.
	stepInstanceMake    = "instance.make"    // the instance's directory
	stepRecordCreate    = "record.create"    // the first record in it
	stepLogMake         = "log.make"         // the workspace's log file
	stepVolumesMake     = "volumes.make"     // directories of named volumes
	stepUserFind        = "user.find"        // look a user up in the image, once
	stepContainerCreate = "container.create" // containerd's record
	stepSnapshotPrepare = "snapshot.prepare" // the root file system
	stepVolumesOwn      = "volumes.own"      // give new volumes to the container's user
	stepFilesMake       = "files.make"       // the directory of its files, for its user
	stepFIFOMake        = "fifo.make"        // make and open both FIFOs
	stepTaskCreate      = "task.create"      // shim, cgroup, runc create
	stepTaskStart       = "task.start"       // the first process begins
	stepPidfdOpen       = "pidfd.open"       // take hold of a process
	stepRecordProcess   = "record.process"   // the first process, on record
	stepInitReady       = "init.ready"       // init's report: the command can be executed
	stepFIFOOpen        = "fifo.open"        // hold the go-ahead as its only writer

	// Arm, and Start where that was of another launch.
	stepFilesWrite  = "files.write"  // its files, beside those that are in place
	stepFilesSwitch = "files.switch" // put them into place, all at once
	stepFilesLink   = "files.link"   // their names, and away with the old ones
	stepRecordArm   = "record.arm"   // the record to be, beside the one that is; Arm only

	// Stop.
	stepRecordStopping = "record.stopping" // that it is us who end it
	stepPidfdSignal    = "pidfd.signal"
	stepPidfdWait      = "pidfd.wait" // the process's end, in the grace period and after SIGKILL

	// Start.
	stepRecordLaunch = "record.launch" // generation and secret versions, on record
	stepFIFOWrite    = "fifo.write"    // the go-ahead
	stepInitResult   = "init.result"   // init's word that it executes, and the end of its FIFO
	stepFIFORemove   = "fifo.remove"
	stepRecordUndo   = "record.undo" // the launch of an instance that did not start

	// Rotate: the steps of files, and these.
	stepLiveSignal   = "live.signal"   // tell the command
	stepRecordRotate = "record.rotate" // what it has now, on record

	// Watch.
	stepExitWait   = "exit.wait"   // begin to wait for the process's end
	stepExitStatus = "exit.status" // its code
	stepRecordExit = "record.exit"

	// Remove.
	stepStandbyDrop     = "standby.drop" // let go of the FIFOs
	stepRecordRemoving  = "record.removing"
	stepTaskGet         = "task.get"  // ask containerd for the task
	stepTaskKill        = "task.kill" // one of which we have no process
	stepTaskDelete      = "task.delete"
	stepShimEnd         = "shim.end"      // shims that containerd has forgotten
	stepBundleRemove    = "bundle.remove" // and their bundle
	stepSocketsRemove   = "sockets.remove"
	stepContainerGet    = "container.get"
	stepContainerDelete = "container.delete"
	stepSnapshotRemove  = "snapshot.remove"
	stepRuncRemove      = "runc.remove" // the OCI runtime's state
	stepCgroupRemove    = "cgroup.remove"
	stepInstanceRemove  = "instance.remove" // the instance's directory

	// List.
	stepContainerList = "container.list"

	// RemoveWorkspace.
	stepLogRemove     = "log.remove"
	stepVolumesRemove = "volumes.remove"
	stepParentRemove  = "parent.remove" // the workspace's cgroup
)

// Steps are the names of all steps, in the order of a cycle.
var Steps = []string{
	stepLeaseCreate, stepImageGet, stepSnapshotStat, stepImageFetch, stepImageResolve, stepImageUnpack, stepLeaseDelete,
	stepImageImport,
	stepInstanceMake, stepRecordCreate, stepLogMake, stepVolumesMake, stepUserFind, stepContainerCreate, stepSnapshotPrepare,
	stepVolumesOwn, stepFilesMake, stepFIFOMake, stepTaskCreate, stepTaskStart, stepPidfdOpen, stepRecordProcess, stepInitReady, stepFIFOOpen,
	stepFilesWrite, stepFilesSwitch, stepFilesLink, stepRecordArm,
	stepRecordStopping, stepPidfdSignal, stepPidfdWait,
	stepRecordLaunch, stepFIFOWrite, stepInitResult, stepFIFORemove, stepRecordUndo,
	stepLiveSignal, stepRecordRotate,
	stepExitWait, stepExitStatus, stepRecordExit,
	stepStandbyDrop, stepRecordRemoving, stepTaskGet, stepTaskKill, stepTaskDelete, stepShimEnd, stepBundleRemove,
	stepSocketsRemove, stepContainerGet, stepContainerDelete, stepSnapshotRemove, stepRuncRemove, stepCgroupRemove,
	stepInstanceRemove,
	stepContainerList,
	stepLogRemove, stepVolumesRemove, stepParentRemove,
}

// step does one step of an effect. Its name is part of the error.
func (d *Driver) step(ctx context.Context, name string, do func(context.Context) error) error {
	if err := d.around(ctx, name, do); err != nil {
		return &stepError{name, err}
	}
	return nil
}

// stepError is the error of a step.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string { return e.step + ": " + e.err.Error() }

func (e *stepError) Unwrap() error { return e.err }

// at says in words in which step an error was made, the innermost; nothing if it
// was in none.
func at(err error) (text string) {
	for e := (*stepError)(nil); errors.As(err, &e); err = e.err {
		text = " at " + e.step
	}
	return text
}

// plain is what steps pass through unless Config.Around says otherwise.
func plain(ctx context.Context, _ string, do func(context.Context) error) error { return do(ctx) }
