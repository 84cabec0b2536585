package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/workspaced/internal/embedded"
	"github.com/workspaced/workspaced/store"
)

// purgeTimeout bounds a purge: it ends what hangs as well.
const purgeTimeout = 5 * time.Minute

// purge removes everything that the instance made, saying what. Nothing of it
// may run but its containers. It can be repeated after it failed half way.
func purge(ctx context.Context, cfg config, log *slog.Logger, out io.Writer) error {
	if os.Geteuid() != 0 {
		return errRoot
	}
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	soft, _, release := stopSignals(ctx, log)
	defer release()
	if !exists(cfg.DataDir) && !exists(cfg.StateDir) {
		fmt.Fprintf(out, "nothing to remove: there is neither %s nor %s\n", cfg.DataDir, cfg.StateDir)
		return nil
	}
	lock, err := lockState(cfg)
	if err != nil {
		return err
	}
	defer lock.release()
	if err := purgeContainers(soft, cfg, log, out); err != nil {
		return err
	}
	if err := unmountBelow(out, cfg.DataDir, cfg.StateDir); err != nil {
		return err
	}
	return removeFiles(cfg, out)
}

// look reads what is to be removed from the database, for which no key is needed.
func look(cfg config) (instance string, workspaces []store.Workspace, err error) {
	if !exists(cfg.database()) {
		return "", nil, fmt.Errorf("there is no database %s", cfg.database())
	}
	return store.Look(cfg.database())
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// purgeContainers removes the instance's containers, and what outlives them, by
// way of containerd. Without the database nobody knows which are the instance's,
// but all in a private containerd are.
func purgeContainers(ctx context.Context, cfg config, log *slog.Logger, out io.Writer) error {
	used, err := usedContainerd(cfg)
	if err != nil {
		return err
	}
	if used == "" {
		return nil // it never came to that
	}
	instance, workspaces, err := look(cfg)
	if err != nil && used == usesPrivate {
		log.Warn("purging without the database", "error", err)
		shims, err := embedded.EndAll(ctx, privateContainerd(cfg, log))
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "ended the private containerd and %d containers\n", shims)
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w; its containers in the containerd at %s have to be removed by hand", err, used)
	}
	if _, err := cfg.initProgram(); err != nil {
		return err // before a containerd is started
	}
	address, private, err := findContainerd(ctx, cfg, log)
	if err != nil {
		return err
	}
	if private != nil {
		defer private.Close(ctx)
	}
	driver, err := openDriver(ctx, cfg, address, instance, log)
	if err != nil {
		return err
	}
	defer driver.Close()
	instances, err := driver.List(ctx, "")
	if err != nil {
		return fmt.Errorf("listing containers: %w", err)
	}
	for _, in := range instances {
		if err := driver.Remove(ctx, in.ID); err != nil {
			return fmt.Errorf("container %s of workspace %s: %w", in.ID, in.WorkspaceID, err)
		}
		fmt.Fprintf(out, "removed container %s of workspace %s (%s)\n", in.ID, in.WorkspaceID, in.Phase)
	}
	for _, w := range workspaces {
		if err := driver.RemoveWorkspace(ctx, w.ID, w.UID, false); err != nil {
			return fmt.Errorf("workspace %s: %w", w.ID, err)
		}
		fmt.Fprintf(out, "removed volumes and log of workspace %s\n", w.ID)
	}
	return nil
}

// unmountBelow ends what is mounted in the directories, the last mount first.
func unmountBelow(out io.Writer, dirs ...string) error {
	for _, dir := range dirs {
		real, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		mounts, err := mountinfo.GetMounts(below(real))
		if err != nil {
			return err
		}
		for _, m := range slices.Backward(mounts) {
			if err := unix.Unmount(m.Mountpoint, 0); err != nil {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
			fmt.Fprintln(out, "unmounted", m.Mountpoint)
		}
	}
	return nil
}

// below keeps the mounts inside dir, not one of dir itself.
func below(dir string) mountinfo.FilterFunc {
	return func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	}
}

// removeFiles removes what the instance made in its directories, and the
// directories unless somebody else's files are there.
func removeFiles(cfg config, out io.Writer) error {
	var ours []string
	for _, path := range []string{cfg.Socket, cfg.metricsSocket()} {
		if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
			ours = append(ours, path)
		}
	}
	for _, name := range []string{"containerd", "containerd.log", "containerd.log.1", "containerd.address", "containerd.address.new", "volumes", "logs", "workspaced.db", "workspaced.key"} {
		ours = append(ours, filepath.Join(cfg.DataDir, name))
	}
	for _, name := range []string{"api", "containerd", "instances", "runc", "workspaced.lock"} {
		ours = append(ours, filepath.Join(cfg.StateDir, name))
	}
	// A crash while one of them was made, or while the database was compacted.
	for _, pattern := range []string{".workspaced.db.*", ".workspaced.key.*"} {
		left, err := filepath.Glob(filepath.Join(cfg.DataDir, pattern))
		if err != nil {
			return err
		}
		ours = append(ours, left...)
	}
	for _, path := range ours {
		if !exists(path) {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		fmt.Fprintln(out, "removed", path)
	}
	for _, dir := range []string{cfg.DataDir, cfg.StateDir} {
		switch err := os.Remove(dir); {
		case err == nil:
			fmt.Fprintln(out, "removed", dir)
		case errors.Is(err, unix.ENOTEMPTY):
			fmt.Fprintf(out, "kept %s: it has files of others\n", dir)
		case errors.Is(err, fs.ErrNotExist):
		default:
			return err
		}
	}
	return nil
}
