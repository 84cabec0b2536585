package ctrd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// prepareState makes the directories, mounts the tmpfs and puts init there.
func (d *Driver) prepareState(ctx context.Context) error {
	for _, dir := range []string{d.cfg.StateDir, d.tmpfs, d.runcRoot, d.volumes, d.logs} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if err := mountTmpfs(d.tmpfs); err != nil {
		return fmt.Errorf("tmpfs at %s: %w", d.tmpfs, err)
	}
	if err := os.MkdirAll(d.instances, 0o700); err != nil {
		return err
	}
	if err := d.installInit(ctx); err != nil {
		return err
	}
	// Those of workspaces whose last instance an earlier process was removing.
	uids, err := d.recordedUIDs()
	if err != nil {
		return err
	}
	for _, uid := range uids {
		_ = unix.Rmdir(filepath.Join(d.instances, uid)) // it is in use
	}
	return nil
}

// mountTmpfs mounts one unless there is one: instances of an earlier daemon
// process live in it. It is never swapped to a disk where the kernel can do
// without (6.4).
func mountTmpfs(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		if mounts[0].FSType != "tmpfs" {
			return fmt.Errorf("a %s is mounted there", mounts[0].FSType)
		}
		return nil
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	err = unix.Mount("workspaced", dir, "tmpfs", flags, "mode=0700,noswap")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("workspaced", dir, "tmpfs", flags, "mode=0700")
	}
	return err
}

// installInit copies workspace-init into the tmpfs under the name of its
// content. So an upgrade replaces no file that a container has mounted, and it
// is executable wherever the original lies.
func (d *Driver) installInit(ctx context.Context) error {
	b, err := os.ReadFile(d.cfg.InitPath)
	if err != nil {
		return fmt.Errorf("workspace-init: %w", err)
	}
	if !strings.HasPrefix(string(b[:min(len(b), 4)]), "\x7fELF") {
		return fmt.Errorf("workspace-init: %s is no program", d.cfg.InitPath)
	}
	sum := sha256.Sum256(b)
	d.initPath = filepath.Join(d.tmpfs, ".init-"+hex.EncodeToString(sum[:8]))
	if have, err := os.ReadFile(d.initPath); err != nil || sha256.Sum256(have) != sum {
		if err := os.WriteFile(d.initPath+".new", b, 0o555); err != nil {
			return err
		}
		if err := os.Rename(d.initPath+".new", d.initPath); err != nil {
			return err
		}
	}
	if d.initID, err = identify(d.initPath); err != nil {
		return err
	}
	if err := d.checkInit(ctx); err != nil {
		return err
	}
	// Those of earlier versions: who runs one has it mounted.
	old, err := filepath.Glob(filepath.Join(d.tmpfs, ".init-*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if path != d.initPath {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkInit has workspace-init be a standby and become a command, workspace-init
// itself without arguments: where it can't, no container would ever start.
func (d *Driver) checkInit(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, d.deadlines.ready)
	defer cancel()
	goAhead, send, err := os.Pipe()
	if err != nil {
		return err
	}
	defer goAhead.Close()
	err = handshake.WriteGoAhead(send, handshake.GoAhead{Argv: []string{d.initPath}}) // as much as a pipe holds
	if err = errors.Join(err, send.Close()); err != nil {
		return err
	}
	receive, result, err := os.Pipe()
	if err != nil {
		return err
	}
	defer receive.Close()
	var cmd *exec.Cmd
	var out []byte
	for {
		cmd = exec.CommandContext(ctx, d.initPath)
		cmd.Args = []string{handshake.StandbyName, d.initPath}
		cmd.Env = []string{}
		cmd.ExtraFiles = make([]*os.File, handshake.ResultFD-2) // from 3 on
		cmd.ExtraFiles[handshake.GoAheadFD-3], cmd.ExtraFiles[handshake.ResultFD-3] = goAhead, result
		out, err = cmd.CombinedOutput()
		// A child that was forked while the copy was written has it open for writing until
		// it executes its own program.
		if !errors.Is(err, unix.ETXTBSY) || ctx.Err() != nil {
			break
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	result.Close()
	if cmd.ProcessState == nil {
		return fmt.Errorf("workspace-init: %s can't be executed: %w", d.cfg.InitPath, err)
	}
	ready, rerr := handshake.ReadResult(receive)
	executing, xerr := handshake.ReadResult(receive)
	if rerr == nil && xerr == nil && ready.Kind == handshake.Ready && executing.Kind == handshake.Executing && cmd.ProcessState.ExitCode() == handshake.ExitUsage {
		return nil
	}
	return fmt.Errorf("workspace-init: %s can't be a standby: %s: %.200s", d.cfg.InitPath, cmd.ProcessState, out)
}

// cgroupMounts are the mount points of the cgroup hierarchies, v1's and v2's.
func cgroupMounts() ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var points []string
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

// anyFormat tells whether the host's kernel executes what init's check of a
// program's format does not know: binfmt_misc has an enabled entry.
func anyFormat() bool {
	entries, err := filepath.Glob("/proc/sys/fs/binfmt_misc/*")
	if err != nil {
		return false
	}
	for _, path := range entries {
		switch filepath.Base(path) {
		case "register", "status":
			continue
		}
		if b, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(b), "enabled") {
			return true
		}
	}
	return false
}
