// Demo runs a workspaced of its own in a temporary directory: to play with (run)
// or to prove that it does its job (prove). Afterwards nothing is left of it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/demo/internal/proof"
	"github.com/workspaced/workspaced/cmd/internal/lab"
)

func main() {
	unix.Umask(0o022)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	root := &cobra.Command{
		Use:           "demo",
		Short:         "Run workspaced in a temporary directory, and remove it again",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetArgs(args)
	root.SetOut(out)
	root.CompletionOptions.DisableDefaultCmd = true

	pairs := 200
	proveCmd := &cobra.Command{
		Use:   "prove",
		Short: "Prove that no change is lost and that changes share restarts",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onStage(cmd.Context(), out, func(s *lab.Stage) error { return prove(cmd.Context(), s, pairs, out) })
		},
	}
	proveCmd.Flags().IntVar(&pairs, "pairs", pairs, "how often the old bug's repro is run")
	root.AddCommand(proveCmd,
		&cobra.Command{
			Use:   "run",
			Short: "Start a daemon, say how to talk to it, end with Ctrl-C",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return onStage(cmd.Context(), out, func(s *lab.Stage) error { return play(cmd.Context(), s, out) })
			},
		},
		&cobra.Command{
			Use:   "env SOCKET",
			Short: "Print the environment of the demo workspace that serves on SOCKET",
			Args:  cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
				defer cancel()
				return lab.PrintEnv(ctx, args[0], out)
			},
		})
	return root.ExecuteContext(ctx)
}

// onStage starts a daemon, does something with it, and removes everything.
func onStage(ctx context.Context, out io.Writer, do func(*lab.Stage) error) (err error) {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	group := -1
	if gid, err := strconv.Atoi(os.Getenv("SUDO_GID")); err == nil {
		group = gid // so that who ran sudo can use the socket without it
	}
	fmt.Fprintln(out, "Starting workspaced with a containerd of its own ...")
	stage, err := lab.NewStage(lab.Options{BinDir: filepath.Dir(exe), Group: group})
	if err != nil {
		return err
	}
	defer func() {
		fmt.Fprintln(out, "\nStopping the daemon and removing everything ...")
		closeErr := stage.Close(context.WithoutCancel(ctx))
		if closeErr == nil {
			fmt.Fprintf(out, "Nothing is left: no process, no mount, no file in %s.\n", stage.Daemon.Base)
		}
		err = errors.Join(err, closeErr)
	}()
	if err := stage.Daemon.Start(ctx); err != nil {
		return err
	}
	return do(stage)
}

// play tells how to talk to the daemon and waits for Ctrl-C.
func play(ctx context.Context, s *lab.Stage, out io.Writer) error {
	printHowTo(s, out)
	if err := s.Daemon.WaitExit(ctx); ctx.Err() == nil {
		if err == nil {
			err = errors.New("exit status 0")
		}
		return fmt.Errorf("the daemon ended by itself: %w\n%s", err, s.Daemon.LogTail())
	}
	return nil
}

func prove(ctx context.Context, s *lab.Stage, pairs int, out io.Writer) error {
	ref, hold, err := s.PushSlow(ctx, "2")
	if err != nil {
		return err
	}
	err = proof.Run(ctx, proof.Config{
		Client:      s.Daemon.Client(),
		Image:       lab.DemoImage,
		SlowImage:   ref,
		Hold:        hold,
		VolumeDir:   s.VolumeDir,
		WorkspaceID: "proof",
		Pairs:       pairs,
		Out:         out,
	})
	if err != nil {
		return fmt.Errorf("DOES NOT HOLD: %w\nthe daemon's log ends with:\n%s", err, s.Daemon.LogTail())
	}
	fmt.Fprintln(out, "\nProved: every change is in the last container, and no restart was superfluous.")
	return nil
}
