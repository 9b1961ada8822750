package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/credential"
)

func newRotateCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate ID...",
		Short: "Rotate now",
		Long: `Rotate now, without waiting for the calendar. Consumers get the new version once it is proven; the old one works on for the overlap.

A credential whose overlap is still open refuses: rotating again would end what applications still use. See also rekey replace.

--wait watches until consumers can read the new version, --wait=revoked until the old one is proven dead, which takes the whole
overlap. Ctrl-C ends the watching, not the rotation.`,
		Example: `  rekey rotate orders/db
  rekey rotate orders/db billing/db --wait
  rekey rotate orders/db --wait=revoked --reason "laptop lost"`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeIDs,
	}
	reason := c.Flags().String("reason", "", "why, for the audit entry")
	wait := c.Flags().String("wait", "", "watch until `promoted` or revoked")
	c.Flags().Lookup("wait").NoOptDefVal = "promoted"
	timeout := c.Flags().Duration("timeout", 0, "with --wait: the longest wait (default 15m; none for revoked)")
	_ = c.RegisterFlagCompletionFunc("wait", cobra.FixedCompletions([]string{"promoted", "revoked"}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if *wait != "" && *wait != "promoted" && *wait != "revoked" {
			return &exit{exitUsage, fmt.Errorf("--wait=%s: want promoted or revoked", *wait)}
		}
		if *timeout == 0 && *wait == "promoted" {
			*timeout = 15 * time.Minute
		}
		client, err := a.client()
		if err != nil {
			return err
		}
		asked, failed := a.steer(cmd.Context(), client, args, credential.Rotate, *reason)
		if *wait == "" || len(asked) == 0 {
			return errors.Join(a.printAsked(asked, "rotation of generation %d begins"), failed)
		}
		done, unfinished := a.waitRotated(cmd.Context(), client, asked, *wait == "revoked", *timeout)
		return errors.Join(a.printAsked(done, "generation %d is "+*wait), failed, unfinished)
	}
	return c
}

// steer sends one request for each id. It goes on after a failure; the error is all of them, joined.
func (a *app) steer(ctx context.Context, client *api.Client, args []string, verb credential.Verb, reason string) ([]api.Credential, error) {
	ids, err := parseIDs(args)
	if err != nil {
		return nil, err
	}
	var views []api.Credential
	var errs []error
	for _, id := range ids {
		v, err := client.Steer(ctx, id, verb, reason)
		if err != nil {
			errs = append(errs, err)
			if errors.Is(err, api.ErrUnreachable) || ctx.Err() != nil {
				break // the others would wait for nothing
			}
			continue
		}
		views = append(views, v)
	}
	return views, errors.Join(errs...)
}

// printAsked shows what was asked for; said has a place for the generation, or none.
func (a *app) printAsked(views []api.Credential, said string) error {
	if len(views) == 0 {
		return nil
	}
	return a.print(views, func(w io.Writer) error {
		for _, v := range views {
			text := said
			if containsVerb(said) {
				text = fmt.Sprintf(said, v.Generation)
			}
			if _, err := fmt.Fprintf(w, "%s: %s\n", v.ID, text); err != nil {
				return err
			}
		}
		return nil
	})
}

func containsVerb(s string) bool {
	for i := range len(s) - 1 {
		if s[i] == '%' && s[i+1] == 'd' {
			return true
		}
	}
	return false
}

// steering is a command that only sends a request.
func (a *app) steering(verb credential.Verb, said, short, long, example string) *cobra.Command {
	c := &cobra.Command{
		Use: string(verb) + " ID...", Short: short, Long: long, Example: example,
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeIDs,
	}
	reason := c.Flags().String("reason", "", "why, for the audit entry")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.client()
		if err != nil {
			return err
		}
		views, failed := a.steer(cmd.Context(), client, args, verb, *reason)
		return errors.Join(a.printAsked(views, said), failed)
	}
	return c
}

func newHoldCommand(a *app) *cobra.Command {
	return a.steering(credential.Hold, "the overlap stays open until rekey resume",
		"Keep an overlap open",
		`Keep an overlap open: the old version works on until rekey resume. For when a consumer turns out not to have read the new one.`,
		"  rekey hold orders/db --reason \"batch job still on the old password\"\n  rekey resume orders/db")
}

func newRollbackCommand(a *app) *cobra.Command {
	return a.steering(credential.Rollback, "the previous version is given to consumers again, as generation %d",
		"Give consumers the previous version again",
		`Give consumers the previous version again. Possible while the overlap is open; the version that they had is then retired in its
place. The next rotation comes as the calendar says.`,
		"  rekey rollback orders/db --reason \"pool cannot parse the new password\"")
}

func newRestoreCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "restore ID...",
		Short: "Make a new version after a kill",
		Long: `Make a new version after a kill: the killed versions are deleted, then a new one is made, proven and published. A killed secret is
never enabled again.

--wait watches until consumers can read the new version. Ctrl-C ends the watching, not the restoring.`,
		Example:           "  rekey restore orders/db --wait\n  rekey restore orders/db --reason \"all clear\"",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeIDs,
	}
	reason := c.Flags().String("reason", "", "why, for the audit entry")
	wait := c.Flags().Bool("wait", false, "watch until the new version is promoted")
	timeout := c.Flags().Duration("timeout", 15*time.Minute, "with --wait: the longest wait; 0 for none")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.client()
		if err != nil {
			return err
		}
		asked, failed := a.steer(cmd.Context(), client, args, credential.Restore, *reason)
		if !*wait || len(asked) == 0 {
			return errors.Join(a.printAsked(asked, "a new version is on its way"), failed)
		}
		for i := range asked { // the new one comes after what was killed
			asked[i].Generation++
		}
		done, unfinished := a.waitRotated(cmd.Context(), client, asked, false, *timeout)
		return errors.Join(a.printAsked(done, "generation %d is promoted"), failed, unfinished)
	}
	return c
}

func newPauseCommand(a *app) *cobra.Command {
	return a.pausing("pause", true, "no step starts until rekey resume",
		"Start no step, for some credentials or the whole fleet",
		`Start no step until rekey resume: for some credentials, or with --all for the whole fleet. What is being done is finished, consumers
keep what they have, and emergencies go on.`,
		"  rekey pause orders/db --reason \"database migration\"\n  rekey pause --all --reason \"incident 42\"")
}

func newResumeCommand(a *app) *cobra.Command {
	return a.pausing("resume", false, "goes on",
		"Undo pause, hold and park",
		`Go on: undo pause and hold, and try again what was parked. --all ends the fleet-wide pause; credentials that were paused one by
one stay paused.`,
		"  rekey resume orders/db\n  rekey resume --all")
}

// pausing is pause or resume.
func (a *app) pausing(use string, paused bool, said, short, long, example string) *cobra.Command {
	c := &cobra.Command{
		Use: use + " {ID...|--all}", Short: short, Long: long, Example: example, ValidArgsFunction: a.completeIDs,
	}
	reason := c.Flags().String("reason", "", "why, for the audit entry")
	all := c.Flags().Bool("all", false, "the whole fleet")
	c.Args = func(_ *cobra.Command, args []string) error {
		if *all == (len(args) > 0) {
			return errors.New("want credential ids, or --all")
		}
		return nil
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := a.client()
		if err != nil {
			return err
		}
		if !*all {
			views, failed := a.steer(cmd.Context(), client, args, credential.Verb(use), *reason)
			return errors.Join(a.printAsked(views, said), failed)
		}
		v, err := client.SetControl(cmd.Context(), paused, *reason)
		if err != nil {
			return err
		}
		return a.print(v, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, "the whole fleet:", said)
			return err
		})
	}
	return c
}
