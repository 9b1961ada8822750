package simledger_test

import (
	"testing"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
	"github.com/rekeyhq/rekey/internal/ledger/simledger"
)

func TestConformance(t *testing.T) {
	ledgertest.Run(t, func(t *testing.T) ledgertest.Subject {
		l := simledger.New(simledger.Config{})
		return ledgertest.Subject{Ledger: l, Acknowledge: func(_ *testing.T, id credential.ID, consumer string, body []byte) {
			l.Acknowledge(id, consumer, body)
		}}
	})
}
