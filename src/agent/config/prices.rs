//! `[repository.prices]`: what the operator of the store asks for. No price is known here.

use super::{Reader, raw};
use crate::error::Result;
use crate::model::cost::{Price, Prices};

/// Billionths in one unit of a currency.
const BILLIONTHS: f64 = 1e9;
/// A price beyond this is a slip of the keyboard, and its billionths would not fit.
const PRICE_MAX: f64 = 1e6;

impl Reader<'_> {
    /// Nothing if no price is more than nothing: then nobody has filled them in.
    pub(super) fn prices(&self, raw: &raw::RawPrices) -> Result<Option<Prices>> {
        let price = |amount: &Option<raw::Amount>| amount.as_ref().map(|amount| self.price(amount)).transpose();
        let prices = Prices {
            currency: self.word_or(&Some(raw.currency.clone()), "")?,
            put_per_1000: price(&raw.put_per_1000)?,
            list_per_1000: price(&raw.list_per_1000)?,
            get_per_1000: price(&raw.get_per_1000)?,
            delete_per_1000: price(&raw.delete_per_1000)?,
            stored_per_gib_month: price(&raw.stored_per_gib_month)?,
            received_per_gib: price(&raw.received_per_gib)?,
            sent_per_gib: price(&raw.sent_per_gib)?,
        };
        let all = [
            prices.put_per_1000,
            prices.list_per_1000,
            prices.get_per_1000,
            prices.delete_per_1000,
            prices.stored_per_gib_month,
            prices.received_per_gib,
            prices.sent_per_gib,
        ];
        Ok(all.iter().flatten().any(|price| price.0 > 0).then_some(prices))
    }

    fn price(&self, amount: &raw::Amount) -> Result<Price> {
        let value = *amount.get_ref();
        if !(0.0..=PRICE_MAX).contains(&value) {
            return Err(self.bad(amount.span(), format!("'{value}' is not a price from 0 to {PRICE_MAX}")));
        }
        // At most 1e15, which is exact.
        Ok(Price((value * BILLIONTHS).round() as u64))
    }
}
